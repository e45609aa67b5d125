"""Ten thousand registered adapters, beside a store that has only those which are asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence

from services.bench import servers
from services.bench.adapters import random_adapter
from services.bench.churn.ground import (
    MODEL_NAME,
    RANK,
    Ground,
    alternate_loads,
    failures,
    model_config,
    ratio_figure,
)
from services.bench.fleet import register_fleet
from services.bench.load.answer import Answer
from services.bench.load.plan import Backend, Load
from services.bench.load.popularity import Mix, Popularity
from services.bench.load.summary import summarise
from services.bench.load.targets import connect
from services.bench.results import Result, spread
from services.bench.seeding import seed

ACTIVE, CONCURRENCY = 8, 8
THROUGHPUT = 0.98


async def catalogue(ground: Ground) -> Result:
    """The same eight adapters are active on both sides."""
    config = model_config(ground.model)
    width = (
        config["hidden_size"],
        config["num_key_value_heads"]
        * (config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]),
    )
    small = random_adapter({"0.self_attn.k_proj": width}, rank=1, base_model=MODEL_NAME)
    many = ground.work / "many"
    seed(
        many,
        ground.sizes.registered,
        base_model=MODEL_NAME,
        config_json=json.dumps(config),
        files=small,
        max_lora_rank=RANK,
    )
    room = ("--max-loras", str(ACTIVE))

    def load(number: int) -> Load:
        return ground.sizes.load(number, max_concurrency=CONCURRENCY, popularity=Popularity(mix=Mix.DISTINCT))

    with (
        servers.store(many) as full,
        servers.store(ground.work / "few") as empty,
        ground.replica("on-many", *room, store=full.address) as on_many,
        ground.replica("on-few", *room, store=empty.address) as on_few,
    ):
        adapters: Sequence[str] = await register_fleet(full.address, on_many.grpc, ACTIVE, (RANK,))
        await register_fleet(empty.address, on_few.grpc, ACTIVE, (RANK,))
        async with connect(Backend.GRPC, on_few.grpc) as few, connect(Backend.GRPC, on_many.grpc) as lots:
            found = await alternate_loads({"few": few, "many": lots}, load, adapters, ground.sizes.rounds)
    rates = {
        kind: [summarise(answers).get("output_throughput", 0.0) for answers in rounds] for kind, rounds in found.items()
    }
    asked: list[Answer] = [answer for rounds in found.values() for answers in rounds for answer in answers]
    figures = [
        ratio_figure(
            f"{ground.sizes.registered:,} registered adapters ÷ {ACTIVE}: output tokens/s",
            [many / few for many, few in zip(rates["many"], rates["few"], strict=True)],
            THROUGHPUT,
            at_most=False,
        ),
        failures(asked),
    ]
    setup = ground.setup(active=ACTIVE, registered=ground.sizes.registered, max_concurrency=CONCURRENCY)
    return Result("churn_catalogue", setup, {kind: spread(values) for kind, values in rates.items()}, figures)
