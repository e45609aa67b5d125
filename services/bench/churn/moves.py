"""Aliases that move and adapters that come new while requests run."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence

from multilora.adapter_store.v1 import admin_pb2, admin_pb2_grpc
from services.bench import clients
from services.bench.adapters import linear_shapes, random_adapter
from services.bench.churn.ground import MODEL_NAME, RANK, Ground, failures, model_config
from services.bench.fleet import DEVIATION, TENANT
from services.bench.load.driver import ask, keep_asking
from services.bench.load.plan import Backend, Planned, endless
from services.bench.load.targets import connect
from services.bench.results import Figure, Result

MOVED, VERSIONS, SLOTS, CONCURRENCY = 4, 2, 8, 8
MOVE_INTERVAL_SECONDS = 0.1
ALIAS = "stable"


async def moves(ground: Ground) -> Result:
    """Requests name the alias; each of the fleet's other adapters is asked for in turn, so that they come and go."""
    async with clients.connect(ground.store) as channel:
        admin = admin_pb2_grpc.AdapterAdminServiceStub(channel)
        with ground.replica("moves", "--max-loras", str(SLOTS)) as replica:
            names = await register_versions(ground, "moved")
            async with connect(Backend.GRPC, replica.grpc) as target:
                until = asyncio.Event()
                asking = keep_asking(
                    target, endless(ground.sizes.load(0), names), max_concurrency=CONCURRENCY, until=until
                )
                loading = keep_asking(target, _newcomers(ground.fleet), max_concurrency=1, until=until)
                loop = asyncio.get_running_loop()
                end = loop.time() + ground.sizes.seconds * ground.sizes.rounds

                async def moving() -> int:
                    for count, name in enumerate(itertools.cycle(names)):
                        if loop.time() >= end:
                            until.set()
                            return count
                        await move_alias(admin, name, 1 + (1 + count // len(names)) % VERSIONS)
                        await asyncio.sleep(MOVE_INTERVAL_SECONDS)
                    raise AssertionError("a cycle has no end")

                answers, loads, count = await asyncio.gather(asking, loading, moving())
                last = await ask(target, Planned(names[0], range(20, 28), 1, 0.0))
    versions = defaultdict(set)
    for answer in answers:
        versions[answer.adapter].add(answer.version)
    met = sum(answer.tier != "GPU" for answer in loads)
    figures = [
        failures([*answers, *loads, last]),
        Figure("alias moves", count, note=f"{sum(map(len, versions.values()))} versions of {MOVED} aliases answered"),
        Figure("loads", met, note=f"of {len(loads)} requests for adapters in turn"),
    ]
    metrics = {"requests": len(answers), "moves": count, "loads": met, "versions_met": sum(map(len, versions.values()))}
    return Result(
        "churn_moves", ground.setup(aliases=MOVED, slots=SLOTS, max_concurrency=CONCURRENCY), metrics, figures
    )


async def register_versions(ground: Ground, prefix: str) -> list[str]:
    """Names of adapters with VERSIONS versions each, referred to by their alias."""
    shapes = linear_shapes(model_config(ground.model))
    names = [f"{TENANT}/{prefix}-{number}" for number in range(MOVED)]
    async with clients.connect(ground.store) as channel:
        for number, (name, version) in enumerate(itertools.product(names, range(VERSIONS))):
            files = random_adapter(shapes, rank=RANK, base_model=MODEL_NAME, seed=1_000 + number, deviation=DEVIATION)
            await clients.upload(channel, name, files, MODEL_NAME)
            if not version:
                await move_alias(admin_pb2_grpc.AdapterAdminServiceStub(channel), name, 1)
    return [f"{name}:{ALIAS}" for name in names]


async def move_alias(admin: admin_pb2_grpc.AdapterAdminServiceAsyncStub, name: str, version: int) -> None:
    target = admin_pb2.WeightedVersion(version=version, weight=1)
    adapter = name.partition(":")[0]
    await admin.SetAlias(admin_pb2.SetAliasRequest(adapter=adapter, alias=ALIAS, targets=[target]))


def _newcomers(fleet: Sequence[str]) -> Iterator[Planned]:
    for name in itertools.cycle(fleet):
        yield Planned(name, range(20, 28), 2, 0.0)
