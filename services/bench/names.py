"""What names cost with many adapters: resolving, listing, starting, watching; each beside the machine's own floor."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from grpc_health.v1 import health_pb2, health_pb2_grpc

from multilora.adapter_store.v1 import admin_pb2, admin_pb2_grpc, store_pb2, store_pb2_grpc
from services.bench import clients, servers
from services.bench.quantile import quantile
from services.bench.results import Figure, Result, latencies, spread
from services.bench.seeding import TENANT, adapter_name
from services.bench.servers import Service

RESOLVE_P99_MS = 5.0
START_SECONDS = 2.0
WATCH_P99_MS = 100.0
# The last page may cost this times the first: a walk over all pages is linear in their number.
LAST_PAGE = 1.5
PAGE_SIZE = 1000
MOVE_INTERVAL_SECONDS = 0.05

Call = Callable[[], Awaitable[object]]


async def resolving(
    stores: Mapping[str, Service], *, adapters: int, rate: float, seconds: float, rounds: int
) -> list[Result]:
    """Random names at a fixed rate, store after store, with as many calls that do nothing between them."""
    blocks: dict[str, list[list[float]]] = {"no-op": [], **{name: [] for name in stores}}
    late: list[float] = []
    pick = random.Random(0)
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(clients.connect(next(iter(stores.values())).address))
        health = health_pb2_grpc.HealthStub(first)
        calls: dict[str, Call] = {"no-op": lambda: health.Check(health_pb2.HealthCheckRequest())}
        for name, store in stores.items():
            channel = await stack.enter_async_context(clients.connect(store.address))
            stub = store_pb2_grpc.AdapterStoreServiceStub(channel)

            def resolve(stub: store_pb2_grpc.AdapterStoreServiceAsyncStub = stub) -> Awaitable[object]:
                reference = f"{TENANT}/{adapter_name(pick.randrange(adapters))}"
                return stub.ResolveAdapter(store_pb2.ResolveAdapterRequest(reference=reference))

            calls[name] = resolve
        for number in range(rounds + 1):
            for name, call in calls.items():
                answered, behind = await at_rate(call, rate, seconds if number else min(seconds, 1.0))
                if number:
                    blocks[name].append(answered)
                    late += behind
    floor = _of_blocks(blocks["no-op"])
    results = []
    for name in stores:
        found = _of_blocks(blocks[name])
        setup = {"index": name, "adapters": adapters, "rate": rate, "seconds": seconds * rounds}
        figure = Figure(
            f"resolve, {adapters:,} adapters, {rate:g}/s, {name}: p99",
            found["p99_ms"],
            " ms",
            RESOLVE_P99_MS,
            at_most=True,
            note=f"p50 {found['p50_ms']:g}; no-op RPC p50 {floor['p50_ms']:g}, p99 {floor['p99_ms']:g} ms",
        )
        metrics = {"resolve": found, "no_op": floor, "sent_late": latencies(late)}
        results.append(Result("resolve", setup, metrics, [figure]))
    return results


def _of_blocks(blocks: Sequence[Sequence[float]]) -> dict[str, float]:
    """Of all blocks together, and the median of their p99s: one hiccup of the machine is in one block."""
    together = latencies([each for block in blocks for each in block])
    middle = spread([latencies(block)["p99_ms"] for block in blocks])["median"]
    return {**together, "all_p99_ms": together["p99_ms"], "p99_ms": middle}


async def at_rate(call: Call, rate: float, seconds: float) -> tuple[list[float], list[float]]:
    """Calls at fixed times, whether or not the ones before were answered: seconds that each took, and was late."""
    took: list[float] = []
    late: list[float] = []

    async def one() -> None:
        began = time.perf_counter()
        await call()
        took.append(time.perf_counter() - began)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(int(rate * seconds)):
            due = began + number / rate
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            late.append(max(time.perf_counter() - due, 0.0))
            group.create_task(one())
    return took, late


async def listing(store: Service, *, index: str, adapters: int, rounds: int) -> Result:
    """All pages, several times over: does the last one cost more than the first?"""
    pages: list[list[float]] = []
    async with clients.connect(store.address) as channel:
        admin = admin_pb2_grpc.AdapterAdminServiceStub(channel)
        page_size = max(1, min(PAGE_SIZE, adapters // 10))
        for number in range(rounds + 1):
            token, took, count = "", list[float](), 0
            while True:
                request = admin_pb2.ListAdaptersRequest(page_size=page_size, page_token=token)
                began = time.perf_counter()
                page = await admin.ListAdapters(request)
                took.append(time.perf_counter() - began)
                count += len(page.adapters)
                if not (token := page.next_page_token):
                    break
            assert count == adapters, f"{count} of {adapters} adapters were listed"
            if number:
                pages.append(took)
    first, last = spread([took[0] for took in pages]), spread([took[-1] for took in pages])
    ratio = min(took[-1] for took in pages) / min(took[0] for took in pages)
    total = spread([sum(took) for took in pages])
    figure = Figure(
        f"list {adapters:,} in pages of {page_size}, {index}: last page ÷ first",
        ratio,
        "",
        LAST_PAGE,
        at_most=True,
        note=f"a page {first['median'] * 1e3:.1f} ms, all {total['median'] * 1e3:.0f} ms",
    )
    setup = {"index": index, "adapters": adapters, "page_size": page_size, "rounds": rounds}
    metrics = {"first_page_seconds": first, "last_page_seconds": last, "all_seconds": total, "last_to_first": ratio}
    return Result("list", setup, metrics, [figure])


def starting(
    root: Path, empty: Path, indexes: Mapping[str, Sequence[str]], *, adapters: int, starts: int
) -> Iterator[Result]:
    """From the command to the line that says it serves, beside a store without adapters."""
    seconds: dict[str, list[float]] = {name: [] for name in indexes}
    floor: list[float] = []
    for number in range(starts + 1):
        with servers.store(empty) as service:
            floor += [service.seconds] if number else []
        for name, flags in indexes.items():
            with servers.store(root, *flags) as service:
                seconds[name] += [service.seconds] if number else []
    for name, took in seconds.items():
        found, least = spread(took), spread(floor)
        figure = Figure(
            f"start with {adapters:,} adapters, {name}",
            found["median"],
            " s",
            START_SECONDS,
            at_most=True,
            note=f"{found['low']:g} to {found['high']:g}; without adapters {least['median']:g} s",
        )
        setup = {"index": name, "adapters": adapters, "starts": starts}
        yield Result("start", setup, {"seconds": found, "empty_seconds": least}, [figure])


async def watching(store: Service, *, index: str, watchers: int, moves: int) -> Result:
    """An alias moves; how long after it was asked for does each watcher, on a connection of its own, hear of it?

    The time that the move itself takes, two syncs of the disk, is part of that, and shown beside it. One move, which
    every watcher hears of first, is not counted: the stores share a log, and it brings what another one wrote.
    """
    name, delays, sent = f"{TENANT}/{adapter_name(0)}", list[float](), dict[str, float]()
    acknowledged: list[float] = []
    async with AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(clients.connect(store.address)) for _ in range(watchers)]
        ready, caught_up = ([asyncio.Event() for _ in channels] for _ in range(2))
        first = f"{index.lower()}-first"

        async def watch(number: int) -> None:
            heard = 0
            stub = store_pb2_grpc.AdapterStoreServiceStub(channels[number])
            async for event in stub.WatchAdapters(store_pb2.WatchAdaptersRequest()):
                if event.reset or event.heartbeat:
                    ready[number].set()
                elif event.alias == first:
                    caught_up[number].set()
                elif event.alias in sent:
                    delays.append(time.perf_counter() - sent[event.alias])
                    heard += 1
                    if heard == moves:
                        return

        async with asyncio.TaskGroup() as group:
            for number in range(watchers):
                group.create_task(watch(number))
            await asyncio.gather(*(event.wait() for event in ready))
            admin = admin_pb2_grpc.AdapterAdminServiceStub(channels[0])
            target = admin_pb2.WeightedVersion(version=1)
            await admin.SetAlias(admin_pb2.SetAliasRequest(adapter=name, alias=first, targets=[target]))
            await asyncio.gather(*(event.wait() for event in caught_up))
            for number in range(moves):
                alias = f"{index.lower()}-{number}"  # the other index has the same log
                sent[alias] = time.perf_counter()
                await admin.SetAlias(admin_pb2.SetAliasRequest(adapter=name, alias=alias, targets=[target]))
                acknowledged.append(time.perf_counter() - sent[alias])
                await asyncio.sleep(MOVE_INTERVAL_SECONDS)
    assert len(delays) == watchers * moves
    found, move = latencies(delays), latencies(acknowledged)
    figure = Figure(
        f"a change to {watchers} watchers, {index}: p99",
        quantile(delays, 0.99) * 1e3,
        " ms",
        WATCH_P99_MS,
        at_most=True,
        note=f"p50 {found['p50_ms']:g} ms; the change itself p50 {move['p50_ms']:g} ms",
    )
    setup = {"index": index, "watchers": watchers, "changes": moves}
    return Result("watch", setup, {"delay": found, "change": move}, [figure])
