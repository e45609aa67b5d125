"""`multilora adapters`: what names mean, who changed it, and back again."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.adapters import PAGE_SIZE, Name, Version
from services.cli.output import Format, Output, Row, print_rows
from services.cli.targets import UINT32_MAX, UINT64_MAX, Targets, targets
from services.common.errors import NotFound

if TYPE_CHECKING:
    from collections.abc import Iterator

    from multilora.adapter_store.v1 import admin_pb2

Alias = Annotated[str, typer.Argument(metavar="ALIAS", help="`stable`, or a free name.")]
Expected = Annotated[
    int | None,
    typer.Option("--expected-revision", min=0, max=UINT64_MAX, help="Refuse when the adapter is at another revision."),
]


def alias(
    context: typer.Context,
    name: Name,
    alias: Alias,
    versions: Annotated[
        list[str], typer.Argument(metavar="VERSION[=WEIGHT]...", help="One version, or several by weight: 1=90 2=10.")
    ],
    expected_revision: Expected = None,
) -> None:
    """Point an alias at a version, or at several by weight."""
    _set_alias(targets(context), name, alias, list(map(_target, versions)), expected_revision)


def unalias(context: typer.Context, name: Name, alias: Alias, expected_revision: Expected = None) -> None:
    """Delete an alias. `stable` goes only when no version lives but those it points to."""
    from multilora.adapter_store.v1 import admin_pb2
    from services.cli.clients import store_admin

    where = targets(context)
    with store_admin(where) as store:
        request = admin_pb2.DeleteAliasRequest(adapter=name, alias=alias, expected_revision=expected_revision)
        adapter = store.DeleteAlias(request, timeout=where.timeout).adapter
    typer.echo(f"{adapter.name}:{alias} is deleted")


def rollback(
    context: typer.Context,
    name: Name,
    alias: Annotated[str, typer.Argument(metavar="[ALIAS]", help="Default: stable.")] = "stable",
) -> None:
    """Point an alias where it pointed before its last move. Refused when the adapter changes meanwhile."""
    where = targets(context)
    moves, revision = [], 0
    for entry in _history(where, name):
        revision = max(revision, entry.revision)
        if entry.alias == alias and entry.targets:
            moves.append([(target.version, target.weight) for target in entry.targets])
            if moves[-1] != moves[0]:
                break
    else:
        raise NotFound("NOTHING_TO_ROLL_BACK", f"{name}:{alias} never pointed elsewhere; see `adapters history {name}`")
    _set_alias(where, name, alias, moves[-1], revision)


def history(
    context: typer.Context,
    name: Name,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Most to print.")] = 100,
    output: Output = Format.TABLE,
) -> None:
    """List who changed what and when, newest first."""
    import itertools

    rows = list(map(_row, itertools.islice(_history(targets(context), name), limit)))
    columns = ("revision", "changed_at", "actor", "kind", "version", "alias", "targets")
    print_rows(rows, columns=columns, output=output, empty="no changes")


def undelete(context: typer.Context, name: Name, version: Version) -> None:
    """Bring a deleted version back, before it is collected."""
    from multilora.adapter_store.v1 import admin_pb2
    from services.cli.clients import store_admin

    where = targets(context)
    with store_admin(where) as store:
        store.UndeleteVersion(admin_pb2.UndeleteVersionRequest(adapter=name, version=version), timeout=where.timeout)
    typer.echo(f"{name}@{version} is back")


def _set_alias(
    where: Targets, name: str, alias: str, wanted: list[tuple[int, int]], expected_revision: int | None
) -> None:
    from multilora.adapter_store.v1 import admin_pb2
    from services.cli.clients import store_admin

    messages = [admin_pb2.WeightedVersion(version=version, weight=weight) for version, weight in wanted]
    request = admin_pb2.SetAliasRequest(
        adapter=name, alias=alias, targets=messages, expected_revision=expected_revision
    )
    with store_admin(where) as store:
        adapter = store.SetAlias(request, timeout=where.timeout).adapter
    if len(wanted) == 1:
        typer.echo(f"{adapter.name}:{alias} is now {adapter.name}@{wanted[0][0]}")
    else:
        shares = ", ".join(f"{adapter.name}@{version} ({weight})" for version, weight in sorted(wanted))
        typer.echo(f"{adapter.name}:{alias} is now {shares}")


def _target(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,20})(?:=([0-9]{1,10}))?", text)
    numbers = (int(found[1]), int(found[2] or "1")) if found else (0, 0)
    if not 1 <= numbers[0] <= UINT64_MAX or not 1 <= numbers[1] <= UINT32_MAX:
        raise typer.BadParameter(f"{text!r} is no version, with or without a weight; as in 3, or 1=90 2=10")
    return numbers


def _history(where: Targets, name: str) -> Iterator[admin_pb2.HistoryEntry]:
    from multilora.adapter_store.v1 import admin_pb2
    from services.cli.clients import store_admin

    token = ""
    with store_admin(where) as store:
        while True:
            request = admin_pb2.GetHistoryRequest(adapter=name, page_size=PAGE_SIZE, page_token=token)
            page = store.GetHistory(request, timeout=where.timeout)
            yield from page.entries
            if not (token := page.next_page_token):
                return


def _row(entry: admin_pb2.HistoryEntry) -> Row:
    from multilora.common.v1 import common_pb2

    return {
        "revision": entry.revision,
        "changed_at": f"{entry.changed_at.ToJsonString()[:19]}Z",
        "actor": entry.actor,
        "kind": common_pb2.ChangeKind.Name(entry.kind).removeprefix("CHANGE_KIND_").lower(),
        "version": entry.version or None,
        "alias": entry.alias,
        "targets": {str(target.version): target.weight for target in entry.targets},
    }
