"""What commands print: tables for people, JSON for scripts, both from the same rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

PIPED_WIDTH = 240
"""Columns of a table nobody watches: wide enough that a digest is not cut."""

SHORT = "--json"
"""Of `--output json`."""

Row = dict[str, Any]


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"


Output = Annotated[Format, typer.Option("--output", help=f"For people, or in full for scripts; {SHORT} for short.")]


class App(typer.Typer):
    """Commands among which those that have `--output` take `--json` as well, its short form."""

    def command(self, *args: Any, **settings: Any) -> Callable[..., Any]:
        return super().command(*args, **({"cls": _Command} | settings))


class _Command(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if any(param.name == "output" for param in self.params):
            end = args.index("--") if "--" in args else len(args)
            args = ["--output=json" if arg == SHORT else arg for arg in args[:end]] + args[end:]
        return super().parse_args(ctx, args)


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Pretty, or a line: indent None."""
    typer.echo(json.dumps(value, indent=indent, ensure_ascii=False))


def print_rows(rows: Sequence[Row], *, columns: Sequence[str], output: Format, empty: str) -> None:
    """The rows as JSON in full, or as a table of `columns`; `empty` says in words that there are none."""
    if output is Format.JSON:
        print_json(rows)
    elif not rows:
        typer.echo(empty, err=True)
    else:
        _print_table(rows, columns)


def print_fields(fields: Row) -> None:
    """One thing, a field a line."""
    width = max(map(len, fields))
    for name, value in fields.items():
        typer.echo(f"{name:<{width}}  {_cell(value)}")


def warn(text: str) -> None:
    typer.echo(f"warning: {text}", err=True)


def _print_table(rows: Sequence[Row], columns: Sequence[str]) -> None:
    from rich.console import Console  # costs a tenth of a second; only tables need it
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        numeric = all(isinstance(row[column], int | float) for row in rows)
        table.add_column(column.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in columns))
    Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, markup=False).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
