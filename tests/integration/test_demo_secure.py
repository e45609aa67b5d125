"""`make demo-secure`: it ends at the first command that does not do, or is not refused, as it says."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from services.cli.tokens import COLUMNS, permission_rows
from services.common.auth.tokens import TOKEN_PREFIX
from tests.conftest import ROOT

pytestmark = pytest.mark.slow


def cells_of(table: str) -> list[list[str]]:
    """Of the rows beneath the head, which says where each column begins."""
    _, _, head, _, *lines = table.splitlines()
    starts = [head.index(column.replace("_", " ")) for column in COLUMNS]
    rows = lines[: len(permission_rows())]
    return [[line[begin:end].strip() for begin, end in zip(starts, [*starts[1:], None], strict=True)] for line in rows]


def test_each_tenant_sees_its_own_and_the_table_is_the_services() -> None:
    command = [sys.executable, "deploy/demo_secure.py"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert TOKEN_PREFIX not in ended.stdout + ended.stderr
    shown, table = ended.stdout.split("Who may do what")
    acme, beta = (shown.split(f"{tenant}-app$ multilora adapters list")[1] for tenant in ("acme", "beta"))
    assert "acme/helper" in acme.split("$")[0] and "beta/" not in acme.split("$")[0]
    assert "beta/helper" in beta.split("$")[0] and "acme/" not in beta.split("$")[0]
    assert shown.count("ADAPTER_NOT_FOUND") == 2
    assert cells_of(table) == [[str(row[column]) for column in COLUMNS] for row in permission_rows()]
    assert re.search(r"acme-app +AdapterAdminService/SetAlias +ROLE_NOT_PERMITTED", table)
