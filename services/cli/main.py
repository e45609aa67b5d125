"""The `multilora` command. Each command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from services.cli import (
    adapter_changes,
    adapter_files,
    adapters,
    base_models,
    bench,
    generation,
    plan,
    residency,
    status,
    store,
    tokens,
)
from services.cli.exit_codes import EXIT_CODES_HELP, exit_code, one_line
from services.cli.output import App
from services.cli.targets import DEFAULT_SERVER, DEFAULT_STORE, DEFAULT_TIMEOUT, Targets
from services.common.errors import MultiloraError

app = App(
    help="Serve many LoRA adapters over one base model: register adapters, generate, look inside.",
    epilog=EXIT_CODES_HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (
    adapter_changes.alias,
    adapter_changes.unalias,
    adapter_changes.rollback,
    adapter_changes.history,
    adapter_changes.undelete,
    adapter_files.validate,
    adapter_files.download,
    residency.load,
    residency.unload,
    residency.pin,
    residency.unpin,
):
    adapters.app.command()(command)
adapters.app.command("import")(adapter_files.import_)
app.add_typer(adapters.app, name="adapters")
app.add_typer(store.app, name="store")
app.add_typer(base_models.app, name="base-models")
app.add_typer(tokens.app, name="tokens")
app.add_typer(bench.app, name="bench")
app.command()(generation.generate)
app.command()(generation.chat)
app.command()(status.status)
app.command()(plan.plan)


@app.callback()
def _options(
    context: typer.Context,
    server: Annotated[
        str, typer.Option(envvar="MULTILORA_SERVER", help="host:port of the inference service.")
    ] = DEFAULT_SERVER,
    address: Annotated[
        str, typer.Option("--store", envvar="MULTILORA_STORE", help="host:port of the adapter store.")
    ] = DEFAULT_STORE,
    actor: Annotated[
        str, typer.Option(envvar="MULTILORA_ACTOR", help="Who asks, for the history of adapters. Default: your login.")
    ] = "",
    server_admin: Annotated[
        str,
        typer.Option(envvar="MULTILORA_SERVER_ADMIN", help="Where it is administered. Default: port + 10."),
    ] = "",
    store_admin: Annotated[
        str, typer.Option(envvar="MULTILORA_STORE_ADMIN", help="Where the store is administered. Default: port + 10.")
    ] = "",
    token_file: Annotated[
        Path | None, typer.Option(envvar="MULTILORA_TOKEN_FILE", help="File of the token; or $MULTILORA_TOKEN itself.")
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(envvar="MULTILORA_CA", help="CA of the services, PEM. Default: plain text."),
    ] = None,
    cert: Annotated[Path | None, typer.Option(envvar="MULTILORA_CERT", help="Certificate to show, PEM.")] = None,
    key: Annotated[Path | None, typer.Option(envvar="MULTILORA_KEY", help="Its private key, PEM.")] = None,
    timeout: Annotated[
        float, typer.Option(envvar="MULTILORA_TIMEOUT", min=0.001, help="Seconds a call may take.")
    ] = DEFAULT_TIMEOUT,
) -> None:
    context.obj = Targets(
        server,
        address,
        timeout,
        actor or os.environ.get("USER", ""),
        server_admin,
        store_admin,
        "" if token_file else os.environ.get("MULTILORA_TOKEN", ""),
        token_file,
        ca,
        cert,
        key,
    )


def run() -> None:
    """Run the command; errors become one line on stderr and an exit code. Typer itself ends with 2 and 130."""
    try:
        app()
    except MultiloraError as error:
        typer.echo(f"multilora: {one_line(error)}", err=True)
        sys.exit(exit_code(error))


if __name__ == "__main__":
    run()
