"""The store's two services, on a port each or on one: what `multilora-adapter-store` and the tests run."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from services.adapter_store.admin_servicer import AdapterAdminServicer
from services.adapter_store.feed import HEARTBEAT_SECONDS, Feed
from services.adapter_store.servicer import SERVICE, AdapterStoreServicer
from services.adapter_store.store import AdapterStore
from services.common.auth.guard import Guard
from services.common.auth.tls import Tls
from services.common.rpc import GrpcServer
from services.common.wire import ADMIN_SERVICE

# Validation and packing keep a core busy each; more at once would only take cores from resolves and pulls.
WORKER_THREADS = 2


def make_server(guard: Guard | None = None, tls: Tls | None = None) -> GrpcServer:
    """A server of both, to bind; nothing is served before `serving`."""
    return GrpcServer([SERVICE, ADMIN_SERVICE], guard=guard, tls=tls)


def make_servers(guard: Guard | None = None, tls: Tls | None = None) -> tuple[GrpcServer, GrpcServer]:
    """What replicas call, and what operators and pipelines do, each to bind to a port of its own."""
    server = GrpcServer([SERVICE], guard=guard, tls=tls)
    return server, GrpcServer([ADMIN_SERVICE], guard=guard, tls=tls, calls=server.calls)


@contextlib.asynccontextmanager
async def serving(
    server: GrpcServer,
    store: AdapterStore,
    *,
    admin: GrpcServer | None = None,
    stop_grace: float,
    heartbeat: float = HEARTBEAT_SECONDS,
) -> AsyncIterator[None]:
    """Serve within the context, healthy while the index answers.

    Leaving it ends watches at once, and gives other calls `stop_grace` seconds.
    admin: None serves administration on the same port
    """
    servers = [server] if admin is None else [server, admin]

    async def set_serving(healthy: bool) -> None:
        for each in servers:
            await each.set_serving(healthy)

    with ThreadPoolExecutor(WORKER_THREADS, "worker") as workers, ThreadPoolExecutor(1, "upkeep") as upkeep:
        async with Feed(store.journal, store.journal.index, heartbeat=heartbeat, on_reach=set_serving) as feed:
            AdapterStoreServicer(store, feed).add_to(server.server)
            AdapterAdminServicer(store, workers, upkeep).add_to(servers[-1].server)
            for each in servers:
                await each.start()
            await set_serving(True)
            try:
                yield
            finally:
                feed.close()
                await asyncio.gather(*(each.stop(stop_grace) for each in servers))
