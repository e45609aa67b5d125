"""The store's metrics on a port of their own. Its server writes OpenMetrics, whose names have no colons."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.adapter_store.catalog import Catalog
from services.common.call_metrics import CallCounts
from services.common.errors import Unavailable


class StoreCollector(Collector):
    """What is registered, asked of the index at each scrape: a scrape fails when the index is away."""

    def __init__(self, catalog: Catalog, calls: CallCounts) -> None:
        self._catalog = catalog
        self._calls = calls

    def describe(self) -> Iterator[Metric]:
        """Nothing: registering must not ask the index."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        totals = self._catalog.totals()
        yield GaugeMetricFamily("multilora_store_adapters", "Adapters registered", value=totals.adapters)
        yield GaugeMetricFamily("multilora_store_versions", "Versions registered", value=totals.versions)
        yield GaugeMetricFamily("multilora_store_base_models", "Base models registered", value=totals.base_models)
        yield from self._calls.collect()


@contextlib.contextmanager
def metrics_served(host: str, port: int, catalog: Catalog, calls: CallCounts) -> Iterator[int]:
    """Serve them while the context is open; the port, 0 being any free one. Raises Unavailable."""
    registry = CollectorRegistry()
    registry.register(StoreCollector(catalog, calls))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise Unavailable("ADDRESS_IN_USE", f"cannot listen on {host}:{port} for metrics: {error}") from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
