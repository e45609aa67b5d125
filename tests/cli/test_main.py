"""The command itself: help, exit codes, and what it does when nobody answers."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from services.cli.exit_codes import EXIT_CODES, EXIT_CODES_HELP, exit_code
from services.common.errors import ERRORS_BY_CODE, MultiloraError
from tests.cli.conftest import Cli, run_cli
from tests.conftest import ROOT
from tests.inference.http.pair import ANSWER_TOKENS, Pair, ended_early

NOBODY = "127.0.0.1:1"


def test_help_needs_neither_grpc_nor_rich() -> None:
    """What makes `--help` answer at once."""
    program = "import sys, services.cli.main; print(*sorted({'grpc', 'rich', 'torch', 'google'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_help_tells_the_exit_codes() -> None:
    done = run_cli("--help")
    assert done.returncode == 0
    for line in EXIT_CODES_HELP.splitlines()[1:]:
        assert line in done.stdout
    assert "MULTILORA_SERVER" in done.stdout


@pytest.mark.parametrize("command", ["adapters list", "adapters history", "base-models list", "store verify", "status"])
def test_help_tells_how_to_get_json(command: str) -> None:
    told = run_cli(*command.split(), "--help").stdout
    assert "--output" in told
    assert "--json" in told


def test_every_error_has_a_code_that_help_tells() -> None:
    told = {int(line.split()[0]) for line in EXIT_CODES_HELP.splitlines()[2:]}
    assert told == {0, 1, 2, *EXIT_CODES.values(), 130}
    assert {exit_code(kind("X", "x")) for kind in ERRORS_BY_CODE.values()} <= told
    assert exit_code(MultiloraError("X", "x")) == 1


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--server-admin", NOBODY, "status"), "administration of the inference service"),
        (("--server", NOBODY, "generate", "x"), "inference service"),
        (("--store-admin", NOBODY, "adapters", "list"), "administration of the adapter store"),
    ],
)
def test_nobody_answers(arguments: tuple[str, ...], what: str) -> None:
    done = run_cli(*arguments)
    assert done.returncode == 5
    assert done.stderr.startswith(f"multilora: no {what} answers at {NOBODY}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("generate",),
        ("generate", "x", "--max-tokens", "0"),
        ("generate", "x", "--seed", str(2**64)),
        ("--timeout", "0", "status"),
        ("status", "--output", "xml"),
        ("generate", "x", "--json"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    assert run_cli(*arguments).returncode == 2


def test_an_interrupt_ends_the_generation(pair: Pair) -> None:
    command = [sys.executable, "-m", "services.cli.main", "--server", pair.server.address]
    command += ["generate", "x", "--max-tokens", str(ANSWER_TOKENS)]  # a prompt the tiny model never ends on
    with (
        ended_early(pair.server),
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130


def test_errors_of_a_generation(cli: Cli) -> None:
    missing = cli("generate", "x", "--adapter", "nobody")
    assert missing.returncode == 3
    assert missing.stderr.endswith("[ADAPTER_NOT_FOUND]\n")
    assert cli("generate", "x", "--temperature", "101").returncode == 4
    late = cli("--timeout", "0.001", "generate", "x")
    assert late.returncode == 5
    assert "--timeout allows more" in late.stderr
