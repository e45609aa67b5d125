"""What a replica's memory goes to, printed without a replica."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import typer

from services.cli.base_models import config_of
from services.cli.output import Format, Row, print_json, print_rows
from services.common.memory_plan import (
    Device,
    Room,
    adapter_elements,
    adapter_elements_by_thumb,
    paged,
    plan_memory,
)
from services.common.packed import ITEM_SIZES
from services.common.profile import longest_context, profile_from_config


def print_memory_plan(
    path: Path, room: Room, gpu: tuple[float, float] | None, kv_cache_bytes: int, ranks: Sequence[int], output: Format
) -> None:
    """Print the plan, and the bytes of adapters.

    path: a config.json, a model directory or a .gguf file
    room: max_model_len 0 is the model's own
    gpu: its memory in GiB and the share that may be taken; None plans for a CPU
    Raises what `profile_from_config` and `plan_memory` raise.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.suffix == ".json" else config_of(path)
    profile_from_config("planned", text)
    config = json.loads(text)
    room = replace(room, max_model_len=room.max_model_len or longest_context(config))
    device = None
    if gpu is not None:
        gib, utilization = gpu
        device = Device(size := int(gib * (1 << 30)), size, utilization)
    plan = plan_memory(config, room, kv_cache_bytes=kv_cache_bytes, device=device)
    adapters = [_adapter_row(config, rank, ITEM_SIZES[room.dtype]) for rank in ranks]
    if output is Format.JSON:
        print_json({"memory": [asdict(row) for row in plan.rows()], "adapters": adapters})
        return
    typer.echo(plan.table())
    typer.echo("\nan adapter on every linear, bytes:")
    print_rows(adapters, columns=tuple(adapters[0]), output=output, empty="")


def _adapter_row(config: dict[str, Any], rank: int, item_bytes: int) -> Row:
    """exact: as it travels; in the pool: with the padding of its last pages."""
    return {
        "rank": rank,
        "exact": adapter_elements(config, rank) * item_bytes,
        "in_the_pool": adapter_elements(config, paged(rank)) * item_bytes,
        "rule_of_thumb": adapter_elements_by_thumb(config, rank) * item_bytes,
    }
