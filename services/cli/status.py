"""`multilora status`: what is resident where, and the load."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from services.cli.output import Format, Output, Row, print_fields, print_json, print_rows
from services.cli.targets import targets

if TYPE_CHECKING:
    from multilora.inference.v1 import control_pb2


def status(context: typer.Context, output: Output = Format.TABLE) -> None:
    """Show the replica's load, and which adapters are resident where."""
    from multilora.inference.v1 import control_pb2
    from services.cli.clients import inference

    where = targets(context)
    with inference(where) as client:
        info = client.control.GetServerInfo(control_pb2.GetServerInfoRequest(), timeout=where.timeout)
        listed = client.control.ListAdapters(control_pb2.ListAdaptersRequest(), timeout=where.timeout)
    rows = list(map(_adapter_row, listed.adapters))
    if output is Format.JSON:
        print_json({"server": _server_row(info), "adapters": rows})
        return
    print_fields(_summary(info))
    typer.echo()
    columns = (
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
    print_rows(rows, columns=columns, output=Format.TABLE, empty="no adapters here yet")


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
