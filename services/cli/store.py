"""`multilora store`: what an operator does to a whole store. Alone among the commands it opens the store's own files.

Reindex and copy work on the backends; verify and collect ask a running store, or work on the backends when told where
they are. All of them may run beside running stores on the same backends.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.output import App, Format, Output, print_fields, print_json
from services.cli.targets import targets

if TYPE_CHECKING:
    from services.adapter_store.store import AdapterStore

app = App(help="A whole adapter store: its log, index and bytes.", no_args_is_help=True, rich_markup_mode=None)

EXIT_PROBLEMS = 1

Blobs = Annotated[
    str,
    typer.Option(
        "--blobs", envvar="MULTILORA_BLOBS", help="Blobs and log: a path or s3://bucket/prefix; as the store's flag."
    ),
]
Index = Annotated[
    str,
    typer.Option(
        "--index",
        envvar="MULTILORA_INDEX",
        help="The index; as the store's flag, and as there with $MULTILORA_REDIS_PREFIX. Default: in the path.",
    ),
]
Staging = Annotated[Path, typer.Option("--data-dir", help="Where bytes wait on their way to S3.", show_default=True)]

DEFAULT_STAGING = Path(".data/store")


@app.command()
def reindex(
    blobs: Blobs, index: Index = "", data_dir: Staging = DEFAULT_STAGING, output: Output = Format.TABLE
) -> None:
    """Make the index anew from the log, in a new epoch: watchers list again. Nothing in the log is touched."""
    with _opened(blobs, index, data_dir) as store:
        entries = store.journal.rebuild()
        position = store.journal.index.position()
    _print({"entries": entries, "epoch": position.epoch, "revision": position.revision}, output)


@app.command()
def verify(
    context: typer.Context,
    blobs: Blobs = "",
    index: Index = "",
    data_dir: Staging = DEFAULT_STAGING,
    output: Output = Format.TABLE,
) -> None:
    """Read every blob that a version needs, compare digests, and the index with the log. 1: there are problems."""
    if blobs:
        with _opened(blobs, index, data_dir) as store:
            found = store.verify()
            fields, problems = {"entries": found.entries, "blobs": found.blobs, "bytes": found.bytes}, found.problems
    else:
        from multilora.adapter_store.v1 import admin_pb2
        from services.cli.clients import store_admin

        where = targets(context)
        with store_admin(where) as admin:
            answer = admin.VerifyIntegrity(admin_pb2.VerifyIntegrityRequest(), timeout=where.timeout)
        fields = {"entries": answer.entries, "blobs": answer.blobs, "bytes": answer.bytes}
        problems = list(answer.problems)
    _report(fields, problems, output)


@app.command()
def collect(
    context: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Give up deleted versions whose grace period is over, and remove bytes that no version needs."""
    from multilora.adapter_store.v1 import admin_pb2
    from services.cli.clients import store_admin

    where = targets(context)
    with store_admin(where) as admin:
        answer = admin.CollectGarbage(admin_pb2.CollectGarbageRequest(dry_run=dry_run), timeout=where.timeout)
    fields: dict[str, Any] = {"versions": list(answer.versions), "blobs": answer.blobs, "bytes": answer.bytes}
    _print(fields | ({"digests": list(answer.digests)} if output is Format.JSON else {}), output)


@app.command()
def copy(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Blobs and log to copy: a path or s3://…")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Where to: empty, or what an earlier run began.")],
    to_index: Annotated[
        str, typer.Option("--to-index", help="The target's index. Default: in the target's path.")
    ] = "",
    data_dir: Staging = DEFAULT_STAGING,
    output: Output = Format.TABLE,
) -> None:
    """Copy a store into another, with its history; run again, it goes on. The copy is verified at its end."""
    import tempfile

    from services.adapter_store.backends import open_place
    from services.adapter_store.copying import Copied, copy_store
    from services.adapter_store.index.sqlite import SqliteIndex
    from services.adapter_store.journal import Journal

    def progress(copied: Copied) -> None:
        typer.echo(f"\r{copied.streams} logs, {copied.blobs} blobs, {copied.bytes:,} bytes", err=True, nl=False)

    with contextlib.ExitStack() as stack:
        to = stack.enter_context(_opened(target, to_index, data_dir))
        from_blobs, from_log = open_place(source, staging=data_dir)
        stack.callback(from_blobs.close)
        stack.callback(from_log.close)
        # the source's own index is not needed: its log is the truth
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        unused = SqliteIndex(Path(scratch) / "index.sqlite3")
        stack.callback(unused.close)
        copied = copy_store(Journal(from_log, unused), from_blobs, to.journal, to.blobs, progress)
        typer.echo("", err=True)
        problems = to.verify().problems
    _report(asdict(copied), problems, output)


@contextlib.contextmanager
def _opened(blobs: str, index: str, data_dir: Path) -> Iterator[AdapterStore]:
    from services.adapter_store.backends import INDEX_FILE, open_index, open_place
    from services.adapter_store.store import AdapterStore

    if not index and "://" in blobs:
        raise typer.BadParameter(f"{blobs} holds no index; say where it is", param_hint="--index")
    places = open_place(blobs, staging=data_dir)
    store = AdapterStore(
        *places,
        open_index(index or str(Path(blobs) / INDEX_FILE), prefix=os.environ.get("MULTILORA_REDIS_PREFIX", "")),
        max_upload_bytes=0,
    )
    try:
        yield store
    finally:
        store.close()


def _print(fields: dict[str, Any], output: Format) -> None:
    print_json(fields) if output is Format.JSON else print_fields(fields)


def _report(fields: dict[str, Any], problems: list[str], output: Format) -> None:
    _print(fields | ({"problems": problems} if output is Format.JSON else {}), output)
    if not problems:
        return
    if output is Format.TABLE:
        for problem in problems:
            typer.echo(f"problem: {problem}", err=True)
    raise typer.Exit(EXIT_PROBLEMS)
