"""`multilora adapters`: files to a store and back: checks, whole trees of adapters, downloads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.adapters import AllowChangedBase, AllowZero, BaseModel, ForceBase, Promote, Version
from services.cli.adapters import Name as AdapterName
from services.cli.output import Format, Output, Row, print_json, print_rows, warn
from services.cli.targets import targets
from services.common.errors import DataLoss, MultiloraError, NotFound

if TYPE_CHECKING:
    from collections.abc import Iterator

    from multilora.adapter_store.v1 import admin_pb2
    from services.common.wire import AdminStub, UploadPart

EXIT_REFUSED = 4

Upload = Annotated[Path, typer.Argument(metavar="PATH", exists=True, file_okay=False, help="A directory PEFT saved.")]


def validate(
    context: typer.Context,
    path: Upload,
    base_model: BaseModel,
    force_base: ForceBase = False,
    allow_zero: AllowZero = False,
    allow_changed_base: AllowChangedBase = False,
    output: Output = Format.TABLE,
) -> None:
    """Check a PEFT directory as a registration would; nothing is kept. 4: it would be refused."""
    from multilora.adapter_store.v1 import admin_pb2
    from services.cli.clients import store_admin
    from services.cli.uploads import check_directory, upload_messages, upload_progress

    header = admin_pb2.RegisterVersionHeader(
        adapter="dry-run",
        base_model=base_model,
        force_base=force_base,
        allow_zero=allow_zero,
        allow_changed_base=allow_changed_base,
    )
    total, where = check_directory(path), targets(context)
    with store_admin(where) as store, upload_progress(path.name, total) as advance:
        answer = store.ValidateVersion(upload_messages(header, path, advance), timeout=where.timeout)
    if output is Format.JSON:
        print_json(_validated_row(answer))
    else:
        for warning in answer.warnings:
            warn(warning)
        for finding in answer.findings:
            typer.echo(f"{finding.reason}: {finding.message}")
        found = answer.finding_count
        typer.echo(f"{found} findings" if found else f"sound: {len(answer.modules)} modules, {answer.digest}")
    if answer.finding_count:
        raise typer.Exit(EXIT_REFUSED)


def import_(
    context: typer.Context,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", exists=True, file_okay=False, help="Holds a PEFT directory an adapter.")
    ],
    base_model: BaseModel,
    tenant: Annotated[str, typer.Option(help="Tenant of every adapter.")] = "default",
    force_base: ForceBase = False,
    allow_zero: AllowZero = False,
    allow_changed_base: AllowChangedBase = False,
    promote: Promote = False,
    output: Output = Format.TABLE,
) -> None:
    """Register a tree of adapters, each named as its folder. 4: some were refused; the others are registered."""
    from multilora.adapter_store.v1 import admin_pb2
    from services.cli.clients import store_admin
    from services.cli.uploads import FILES, check_directory, upload_messages, upload_progress

    folders = sorted(path.parent for path in directory.glob(f"*/{FILES[0]}"))
    if not folders:
        raise NotFound(
            "FILE_NOT_FOUND", f"{directory} has no folder with an {FILES[0]}; one folder an adapter is taken"
        )
    rows, where = list[Row](), targets(context)
    total = sum(path.stat().st_size for folder in folders for name in FILES if (path := folder / name).is_file())
    with store_admin(where) as store, upload_progress(f"{len(folders)} adapters", total) as advance:
        for folder in folders:
            header = admin_pb2.RegisterVersionHeader(
                adapter=f"{tenant}/{folder.name}",
                base_model=base_model,
                force_base=force_base,
                allow_zero=allow_zero,
                allow_changed_base=allow_changed_base,
                promote=promote,
            )
            try:
                check_directory(folder)
                answer = _register(store, upload_messages(header, folder, advance), where.timeout)
            except MultiloraError as error:
                if error.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
                    raise
                rows.append(_import_row(header.adapter, "refused", reason=error.reason, message=error.message))
            else:
                result = "was there already" if answer.existed else "registered"
                rows.append(_import_row(header.adapter, result, version=answer.version.identity.version))
    columns = ("adapter", "result", "version", "reason")
    print_rows(rows, columns=columns, output=output, empty="no adapters")
    refused = [row for row in rows if row["result"] == "refused"]
    for row in refused:
        typer.echo(f"{row['adapter']}: {row['message']}", err=True)
    if refused:
        raise typer.Exit(EXIT_REFUSED)


def download(
    context: typer.Context,
    name: AdapterName,
    version: Version,
    directory: Annotated[Path, typer.Argument(metavar="DIR", file_okay=False, help="Where to; made if need be.")],
) -> None:
    """Get a version's original files back, byte for byte."""
    from multilora.adapter_store.v1 import admin_pb2
    from services.cli.clients import store_admin
    from services.cli.uploads import FILES

    where = targets(context)
    directory.mkdir(parents=True, exist_ok=True)
    with store_admin(where) as store:
        for file in FILES:
            request = admin_pb2.DownloadVersionRequest(adapter=name, version=version, file=file)
            partial, size, total = directory / f"{file}.partial", 0, 0
            with partial.open("wb") as out:
                for part in store.DownloadVersion(request, timeout=where.timeout):
                    total = total or part.total_size
                    size += out.write(part.data)
            if size != total:
                raise DataLoss("SHORT_READ", f"{file} ended after {size} of {total} bytes; try again")
            partial.replace(directory / file)
    typer.echo(f"{name}@{version} is in {directory}")


def _register(store: AdminStub, parts: Iterator[UploadPart], timeout: float) -> admin_pb2.RegisterVersionResponse:
    """Register one of many: a refusal is raised here, and the channel goes on."""
    import grpc

    from services.common.rpc import from_rpc_error

    try:
        answer: admin_pb2.RegisterVersionResponse = store.RegisterVersion(parts, timeout=timeout)
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error
    return answer


def _validated_row(answer: admin_pb2.ValidateVersionResponse) -> Row:
    return {
        "digest": answer.digest,
        "finding_count": answer.finding_count,
        "findings": [
            {"reason": finding.reason, "message": finding.message, "facts": dict(finding.facts)}
            for finding in answer.findings
        ],
        "modules": [{"name": module.name, "rank": module.rank, "scale": module.scale} for module in answer.modules],
        "warnings": list(answer.warnings),
    }


def _import_row(adapter: str, result: str, *, version: int | None = None, reason: str = "", message: str = "") -> Row:
    return {"adapter": adapter, "result": result, "version": version, "reason": reason, "message": message}
