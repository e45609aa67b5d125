"""`multilora status`: what is resident where, and the load."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.output import Format, Output, Row, print_fields, print_json, print_rows
from services.cli.targets import targets

if TYPE_CHECKING:
    from multilora.inference.v1 import control_pb2

_COLUMNS = (
    "adapter",
    "tier",
    "state",
    "pinned",
    "slot",
    "rank",
    "pages",
    "references",
    "waiting",
    "requests",
    "cpu_bytes",
    "error",
)


def status(
    context: typer.Context,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again and again, until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Between two looks of --watch.")] = 2.0,
    output: Output = Format.TABLE,
) -> None:
    """Show the replica's load, and which adapters are resident where. With --watch, JSON is a line a look."""
    from multilora.inference.v1 import control_pb2
    from services.cli.clients import control

    where = targets(context)
    before: control_pb2.GetServerInfoResponse | None = None
    with control(where) as client:
        try:
            while True:
                info = client.GetServerInfo(control_pb2.GetServerInfoRequest(), timeout=where.timeout)
                listed = client.ListAdapters(control_pb2.ListAdaptersRequest(), timeout=where.timeout)
                _show(info, list(map(_adapter_row, listed.adapters)), before, watch=watch, output=output)
                if not watch:
                    return
                before = info
                time.sleep(interval)
        except KeyboardInterrupt:
            if not watch:
                raise


def _show(
    info: control_pb2.GetServerInfoResponse,
    rows: list[Row],
    before: control_pb2.GetServerInfoResponse | None,
    *,
    watch: bool,
    output: Format,
) -> None:
    """One look. before: the look before it, since which the rates are."""
    if output is Format.JSON:
        print_json({"server": _server_row(info), "adapters": rows}, indent=None if watch else 2)
        return
    if watch:
        from rich.console import Console

        Console().clear()  # a terminal's; a pipe's looks follow one another
    print_fields(_summary(info) | _rates(info, before))
    typer.echo()
    print_rows(rows, columns=_COLUMNS, output=Format.TABLE, empty="no adapters here yet")


def _rates(info: control_pb2.GetServerInfoResponse, before: control_pb2.GetServerInfoResponse | None) -> Row:
    if before is None or info.uptime <= before.uptime:
        return {}
    seconds = info.uptime - before.uptime
    steps, evictions = info.steps - before.steps, info.slot_evictions - before.slot_evictions
    return {"now": f"{steps / seconds:.1f} steps/s, {evictions / seconds:.1f} evictions/s"}


def _summary(info: control_pb2.GetServerInfoResponse) -> Row:
    used = info.kv_blocks - info.kv_blocks_free
    return {
        "model": f"{info.model} (multilora {info.version}, up {info.uptime:.0f} s)",
        "requests": f"{info.requests_running} running, {info.requests_waiting} waiting",
        "KV cache": f"{used} of {info.kv_blocks} blocks of {info.block_size} tokens",
        "adapters": f"at most {info.max_loras} resident, {info.max_cpu_loras} in memory, rank {info.max_lora_rank}",
        "steps": f"{info.steps}, with at most {info.max_adapters_in_step} adapters in one",
        "evictions": info.slot_evictions,
        "preemptions": info.preemptions,
    }


def _server_row(info: control_pb2.GetServerInfoResponse) -> Row:
    return {field.name: getattr(info, field.name) for field in info.DESCRIPTOR.fields}


def _adapter_row(adapter: control_pb2.ResidentAdapter) -> Row:
    from multilora.common.v1 import common_pb2

    resident = adapter.tier == common_pb2.TIER_GPU
    return {
        "adapter": f"{adapter.identity.adapter}@{adapter.identity.version}",
        "digest": adapter.identity.digest,
        "tier": common_pb2.Tier.Name(adapter.tier).removeprefix("TIER_"),
        "slot": adapter.slot if resident else None,
        "pages": adapter.pages,
        "references": adapter.references,
        "requests": adapter.requests,
        "rank": adapter.rank,
        "cpu_bytes": adapter.cpu_bytes,
        "error": adapter.error,
        "waiting": adapter.waiting,
        "state": adapter.state,
        "pinned": adapter.pinned,
    }
