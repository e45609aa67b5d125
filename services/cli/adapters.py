"""`multilora adapters`: registering adapters and moving what their names mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.output import App, Format, Output, Row, print_fields, print_json, print_rows, warn
from services.cli.targets import UINT64_MAX, targets

if TYPE_CHECKING:  # grpc and the protos cost a third of a second; `--help` does not pay it
    from multilora.adapter_store.v1 import admin_pb2

app = App(help="Adapters in the adapter store.", no_args_is_help=True, rich_markup_mode=None)

Name = Annotated[str, typer.Argument(metavar="NAME", help="`tenant/name`; `name` alone is tenant `default`.")]
Version = Annotated[int, typer.Argument(metavar="VERSION", min=1, max=UINT64_MAX, help="The version's number.")]
BaseModel = Annotated[str, typer.Option("--base-model", help="Registered base model the adapter was trained on.")]
ForceBase = Annotated[
    bool, typer.Option("--force-base", help="Accept a base_model_name_or_path that the profile does not know.")
]
AllowZero = Annotated[bool, typer.Option("--allow-zero", help="Accept an adapter whose B is zero in every module.")]
AllowChangedBase = Annotated[
    bool, typer.Option("--allow-changed-base", help="Accept an init_lora_weights that assumes changed base weights.")
]
Promote = Annotated[bool, typer.Option("--promote", help="Move the alias `stable` to the new version.")]

PAGE_SIZE = 1000


@app.command()
def register(
    context: typer.Context,
    name: Name,
    path: Annotated[Path, typer.Argument(metavar="PATH", exists=True, file_okay=False, help="A directory PEFT saved.")],
    base_model: BaseModel,
    force_base: ForceBase = False,
    allow_zero: AllowZero = False,
    allow_changed_base: AllowChangedBase = False,
    promote: Promote = False,
    output: Output = Format.TABLE,
) -> None:
    """Upload a PEFT directory as the adapter's next version."""
    from multilora.adapter_store.v1 import admin_pb2
    from services.cli.clients import store_admin
    from services.cli.uploads import check_directory, upload_messages, upload_progress

    header = admin_pb2.RegisterVersionHeader(
        adapter=name,
        base_model=base_model,
        force_base=force_base,
        allow_zero=allow_zero,
        allow_changed_base=allow_changed_base,
        promote=promote,
    )
    total, where = check_directory(path), targets(context)
    with store_admin(where) as store, upload_progress(name, total) as advance:
        answer = store.RegisterVersion(upload_messages(header, path, advance), timeout=where.timeout)
    _print_registered(answer, output=output)


@app.command("register-uri")
def register_uri(
    context: typer.Context,
    name: Name,
    uri: Annotated[
        str,
        typer.Argument(metavar="URI", help="file:// or s3:// and a PEFT directory beneath a --uri-root of the store."),
    ],
    base_model: BaseModel,
    force_base: ForceBase = False,
    allow_zero: AllowZero = False,
    allow_changed_base: AllowChangedBase = False,
    promote: Promote = False,
    output: Output = Format.TABLE,
) -> None:
    """Register a PEFT directory that the store itself can read."""
    from multilora.adapter_store.v1 import admin_pb2
    from services.cli.clients import store_admin

    header = admin_pb2.RegisterVersionHeader(
        adapter=name,
        base_model=base_model,
        force_base=force_base,
        allow_zero=allow_zero,
        allow_changed_base=allow_changed_base,
        promote=promote,
    )
    where = targets(context)
    with store_admin(where) as store:
        request = admin_pb2.RegisterFromUriRequest(header=header, uri=uri)
        answer = store.RegisterFromUri(request, timeout=where.timeout)
    _print_registered(answer, output=output)


@app.command("list")
def list_(
    context: typer.Context,
    tenant: Annotated[str, typer.Option(help="Only this tenant's.")] = "",
    output: Output = Format.TABLE,
) -> None:
    """List adapters by name."""
    from multilora.adapter_store.v1 import admin_pb2
    from services.cli.clients import store_admin

    where, rows, token = targets(context), list[Row](), ""
    with store_admin(where) as store:
        while True:
            request = admin_pb2.ListAdaptersRequest(tenant=tenant, page_size=PAGE_SIZE, page_token=token)
            page = store.ListAdapters(request, timeout=where.timeout)
            rows += map(_adapter_row, page.adapters)
            if not (token := page.next_page_token):
                break
    columns = ("name", "aliases", "latest_version", "num_versions", "base_model")
    print_rows(rows, columns=columns, output=output, empty="no adapters")


@app.command()
def versions(
    context: typer.Context,
    name: Name,
    include_deleted: Annotated[bool, typer.Option("--include-deleted", help="Deleted versions too.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """List an adapter's versions, newest first."""
    from multilora.adapter_store.v1 import admin_pb2
    from services.cli.clients import store_admin

    where, rows, token = targets(context), list[Row](), ""
    with store_admin(where) as store:
        while True:
            request = admin_pb2.ListVersionsRequest(
                adapter=name, include_deleted=include_deleted, page_size=PAGE_SIZE, page_token=token
            )
            page = store.ListVersions(request, timeout=where.timeout)
            rows += map(_version_row, page.versions)
            if not (token := page.next_page_token):
                break
    shown = rows if output is Format.JSON else list(map(_shortened, rows))
    columns = ("version", "aliases", "created_at", "max_rank", "parameters", "dtype", "deleted", "digest")
    print_rows(shown, columns=columns, output=output, empty="no versions")


@app.command()
def show(
    context: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="NAME@VERSION", help="One version, as in pirate@3.")],
    output: Output = Format.TABLE,
) -> None:
    """Describe one version, and every module it adapts."""
    from multilora.adapter_store.v1 import admin_pb2
    from services.cli.clients import store_admin

    name, _, number = reference.partition("@")
    if not (number.isdecimal() and number.isascii() and int(number) <= UINT64_MAX):
        raise typer.BadParameter(f"{reference!r} names no version; as in pirate@3", param_hint="NAME@VERSION")
    where = targets(context)
    with store_admin(where) as store:
        request = admin_pb2.GetVersionRequest(adapter=name, version=int(number))
        version = store.GetVersion(request, timeout=where.timeout).version
    modules = [{"name": module.name, "rank": module.rank, "scale": module.scale} for module in version.modules]
    if output is Format.JSON:
        print_json(_version_row(version) | {"modules": modules})
        return
    print_fields(_version_row(version))
    print_rows(modules, columns=("name", "rank", "scale"), output=Format.TABLE, empty="no modules")


@app.command()
def delete(context: typer.Context, name: Name, version: Version) -> None:
    """Delete a version that no alias points to. `undelete` brings it back, until it is collected."""
    from multilora.adapter_store.v1 import admin_pb2
    from services.cli.clients import store_admin

    where = targets(context)
    with store_admin(where) as store:
        store.DeleteVersion(admin_pb2.DeleteVersionRequest(adapter=name, version=version), timeout=where.timeout)
    typer.echo(f"{name}@{version} is deleted")


def _print_registered(
    answer: admin_pb2.RegisterVersionResponse | admin_pb2.RegisterFromUriResponse, *, output: Format
) -> None:
    row = _version_row(answer.version) | {"bound_modules": len(answer.version.modules), "existed": answer.existed}
    if output is Format.JSON:
        print_json(row | {"warnings": list(answer.warnings)})
        return
    typer.echo(f"{row['adapter']}@{row['version']} {'was there already' if answer.existed else 'is registered'}")
    print_fields(
        {name: row[name] for name in ("digest", "bound_modules", "max_rank", "parameters", "dtype", "aliases")}
    )
    for warning in answer.warnings:
        warn(warning)


def _adapter_row(adapter: admin_pb2.Adapter) -> Row:
    return {
        "name": adapter.name,
        "aliases": {alias.name: _shown_targets(alias.targets) for alias in adapter.alias_targets},
        "latest_version": adapter.latest_version,
        "num_versions": adapter.num_versions,
        "base_model": adapter.base_model,
        "revision": adapter.revision,
    }


def _shown_targets(targets: Sequence[admin_pb2.WeightedVersion]) -> int | str:
    """A version, or `1 (90) 2 (10)`."""
    if len(targets) == 1:
        return targets[0].version
    return " ".join(f"{target.version} ({target.weight})" for target in targets)


def _version_row(version: admin_pb2.AdapterVersion) -> Row:
    return {
        "adapter": version.identity.adapter,
        "version": version.identity.version,
        "digest": version.identity.digest,
        "pack_digest": version.identity.pack_digest,
        "pack_size": version.identity.pack_size,
        "base_model": version.identity.base_model,
        "created_at": version.created_at.ToJsonString(),
        "max_rank": version.max_rank,
        "parameters": version.parameters,
        "dtype": version.dtype,
        "aliases": list(version.aliases),
        "deleted": version.deleted,
        "collected": version.collected,
    }


def _shortened(row: Row) -> Row:
    """A version's row as it fits a line: enough of the digest to tell versions apart, the time to the second."""
    return row | {"digest": row["digest"][: len("sha256:") + 12], "created_at": f"{row['created_at'][:19]}Z"}
