from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.inference.http.pair import Pair, run_pair

Cli = Callable[..., subprocess.CompletedProcess[str]]


def run_cli(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The command as a shell runs it."""
    command = [sys.executable, "-m", "services.cli.main", *arguments]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="package")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with run_pair(tiny_model, tmp_path_factory.mktemp("cli")) as running:
        yield running


@pytest.fixture
def cli(pair: Pair) -> Cli:
    """The command, told where the two services are."""

    def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        where = ("--server", pair.server.address, "--server-admin", pair.server.address)
        where += ("--store", pair.store.address, "--store-admin", pair.store.address)
        return run_cli(*where, *arguments, stdin=stdin)

    return run
