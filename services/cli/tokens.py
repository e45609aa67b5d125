"""`multilora tokens`: who may call. It works on the services' file, which they read again when it changes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from services.cli.output import App, Format, Output, Row, print_rows
from services.common.auth.permissions import ADMIN, RULES, Role, may

app = App(help="Who may call the services: their file of tokens.", no_args_is_help=True, rich_markup_mode=None)

File = Annotated[
    Path,
    typer.Option("--file", envvar="MULTILORA_TOKENS", dir_okay=False, help="TOML or JSON; as the services' --tokens."),
]

COLUMNS = ("call", *Role, "every_tenant_only")


@app.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Stands in histories and in the audit record.")],
    role: Annotated[Role, typer.Option(help="What they may do; `permissions` shows it.")],
    tenant: Annotated[str, typer.Option(help="Whose adapters they see; `*`: everybody's, as a replica must.")],
    file: File,
    expires_in: Annotated[float | None, typer.Option(metavar="DAYS", min=0.001, help="Days until it expires.")] = None,
) -> None:
    """Make a token, print it this once, and append its hash to the file, which is made when there is none."""
    from services.common.auth.tokens import add_token

    expires = None
    if expires_in is not None:
        expires = (datetime.now(UTC) + timedelta(days=expires_in)).replace(microsecond=0)
    typer.echo(add_token(file, name=name, role=role, tenant=tenant, expires=expires))


@app.command()
def permissions(output: Output = Format.TABLE) -> None:
    """Show what each role may do: the table that the services go by."""
    print_rows(permission_rows(), columns=COLUMNS, output=output, empty="")


def permission_rows() -> list[Row]:
    """A row for every call. every_tenant_only: takes a token of tenant `*`"""
    rows: list[Row] = []
    for key, rule in RULES.items():
        roles = {str(role): "yes" if may(rule, role, every_tenant=True) else "" for role in Role}
        kind = "open" if rule.open else "" if may(rule, ADMIN, every_tenant=False) else "yes"
        rows.append({"call": key.rpartition(".")[2], **roles, "every_tenant_only": kind})
    return rows
