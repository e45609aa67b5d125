"""Both services over TLS, asking for tokens, with two tenants: what each sees, may do, and cannot tell.

Needs nothing but the project's own environment and the command openssl, and leaves nothing behind: `make demo-secure`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from services.bench import servers
from services.bench.certificates import Authority
from services.cli.tokens import COLUMNS, permission_rows

ROOT = Path(__file__).resolve().parents[1]
ADAPTERS = Path("tests/assets/adapters")
BASE_MODEL = "smollm2-135m-instruct"
TRAINED_ON = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTION = "What is the capital of France?"
CALLERS = (
    ("ops", "admin", "*"),
    ("replica", "replica", "*"),
    ("acme-ci", "publisher", "acme"),
    ("acme-app", "reader", "acme"),
    ("beta-ci", "publisher", "beta"),
    ("beta-app", "reader", "beta"),
)

console = Console()
if not console.is_terminal:
    console = Console(width=120)


@dataclass(frozen=True)
class Demo:
    """Two running services. where: flags of `multilora` that say so; tokens: by whom they are for"""

    where: Sequence[str]
    tokens: dict[str, str]
    audit: Path

    def run(self, who: str, *arguments: str, refused: str = "") -> str:
        """Show a command and what it says, as `who`. refused: the reason it must be refused with, if any."""
        console.print(f"\n[bold]{who}$[/bold] multilora {shlex.join(arguments)}", highlight=False)
        done = _multilora([*self.where, *arguments], self.tokens.get(who, ""))
        said = (done.stdout + done.stderr).strip()
        console.print("\n".join(f"  {line.rstrip()}" for line in said.splitlines()), highlight=False, markup=False)
        if (done.returncode != 0) != bool(refused) or refused not in said:
            sys.exit(f"demo-secure: expected {refused or 'success'}")
        return said


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="demo-secure-") as directory, started(Path(directory)) as demo:
        base = ["base-models", "register", BASE_MODEL, "--from-server", "--accept", TRAINED_ON]
        demo.run("ops", *base)
        for tenant, adapter in (("acme", "pirate"), ("beta", "french")):
            demo.run(
                f"{tenant}-ci", "adapters", "register", "helper", str(ADAPTERS / adapter), "--base-model", BASE_MODEL
            )
        console.rule("Each sees its own, under the same name")
        for tenant in ("acme", "beta"):
            demo.run(f"{tenant}-app", "adapters", "list")
            demo.run(f"{tenant}-app", "generate", "--chat", "--adapter", "helper", "--max-tokens", "24", QUESTION)
        console.rule("And cannot tell whether another's is there")
        demo.run("beta-app", "generate", "--adapter", "acme/helper", "x", refused="ADAPTER_NOT_FOUND")
        demo.run("beta-app", "generate", "--adapter", "acme/nobody", "x", refused="ADAPTER_NOT_FOUND")
        console.rule("A role may do what the table says")
        demo.run("acme-app", "adapters", "alias", "helper", "canary", "1", refused="ROLE_NOT_PERMITTED")
        demo.run("acme-ci", "adapters", "alias", "helper", "canary", "1")
        demo.run("nobody", "adapters", "list", refused="NO_TOKEN")
        demo.run("acme-ci", "adapters", "history", "helper")
        show_permissions()
        show_audit(demo.audit)


@contextlib.contextmanager
def started(work: Path) -> Iterator[Demo]:
    authority = Authority(work / "certificates")
    shown = authority.issue("localhost")
    tokens_file, audit = work / "tokens.toml", work / "audit.jsonl"
    tokens: dict[str, str] = {}
    for name, role, tenant in CALLERS:
        flags = ["--role", role, "--tenant", tenant, "--file", str(tokens_file)]
        tokens[name] = _multilora(["tokens", "create", name, *flags]).stdout.strip()
    (work / "replica.token").write_text(tokens["replica"])
    security = ["--tls-cert", str(shown.cert), "--tls-key", str(shown.key), "--tokens", str(tokens_file)]
    security += ["--audit-log", str(audit)]
    with contextlib.ExitStack() as stack:
        with console.status("starting both services"):
            store = stack.enter_context(servers.store(work / "store", "--admin-port", "0", *security))
            store_address, store_admin = store.address.split(" admin=")
            own = ["--served-model-name", BASE_MODEL, "--adapter-store", store_address]
            own += ["--adapter-store-admin", store_admin, "--adapter-store-ca", str(authority.ca)]
            own += ["--adapter-store-token-file", str(work / "replica.token"), "--admin-port", "0", *security]
            replica = stack.enter_context(servers.inference(work / "inference", servers.embedded_model(), *own))
        console.print(f"adapter store      {store_address}, administered at {store_admin}")
        console.print(f"inference service  {replica.grpc}, administered at {replica.admin}")
        where = ["--server", replica.grpc, "--server-admin", replica.admin, "--store", store_address]
        yield Demo([*where, "--store-admin", store_admin, "--ca", str(authority.ca)], tokens, audit)


def show_permissions() -> None:
    table = Table(title="Who may do what (multilora tokens permissions)", box=SIMPLE_HEAD, title_justify="left")
    for column in COLUMNS:
        table.add_column(column.replace("_", " "))
    for row in permission_rows():
        table.add_row(*(str(row[column]) for column in COLUMNS))
    console.print()
    console.print(table, highlight=False)


def show_audit(path: Path) -> None:
    console.print("[bold]The audit record of both services[/bold]")
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        call = entry["call"].rpartition(".")[2]
        what = entry["what"].get("adapter", "")
        text = f"{entry['at'][:19]}  {entry['who']:<8} {call:<37} {entry['outcome']:<18} {what}"
        console.print(text, highlight=False, markup=False)


def _multilora(arguments: Sequence[str], token: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.cli.main", *arguments]
    environment = os.environ | {"MULTILORA_TOKEN": token, "USER": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    servers.end_with_sigterm()
    main()
