"""The store's two services on one port: what `multilora-adapter-store` and the tests run."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from services.adapter_store.admin_servicer import AdapterAdminServicer
from services.adapter_store.feed import HEARTBEAT_SECONDS, Feed
from services.adapter_store.servicer import SERVICE, AdapterStoreServicer
from services.adapter_store.store import AdapterStore
from services.common.rpc import GrpcServer
from services.common.wire import ADMIN_SERVICE

# Validation and packing keep a core busy each; more at once would only take cores from resolves and pulls.
WORKER_THREADS = 2


def make_server() -> GrpcServer:
    """A server to bind; nothing is served before `serving`."""
    return GrpcServer([SERVICE, ADMIN_SERVICE])


@contextlib.asynccontextmanager
async def serving(
    server: GrpcServer, store: AdapterStore, *, stop_grace: float, heartbeat: float = HEARTBEAT_SECONDS
) -> AsyncIterator[None]:
    """Serve within the context, healthy while the index answers.

    Leaving it ends watches at once, and gives other calls `stop_grace` seconds.
    """
    with ThreadPoolExecutor(WORKER_THREADS, "worker") as workers, ThreadPoolExecutor(1, "upkeep") as upkeep:
        async with Feed(store.journal, store.journal.index, heartbeat=heartbeat, on_reach=server.set_serving) as feed:
            AdapterStoreServicer(store, feed).add_to(server.server)
            AdapterAdminServicer(store, workers, upkeep).add_to(server.server)
            await server.start()
            await server.set_serving(True)
            try:
                yield
            finally:
                feed.close()
                await server.stop(stop_grace)
