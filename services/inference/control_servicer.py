"""AdapterControlService: what is resident on this replica, from the engine's own state."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import grpc.aio

from multilora.inference.v1 import control_pb2, control_pb2_grpc
from services.common.auth.callers import caller
from services.common.references import tenant_of
from services.inference.conversion import from_resident, from_tier, from_version
from services.inference.replica_control import Loaded, ReplicaControl
from services.inference.serving import Serving

Context = grpc.aio.ServicerContext[Any, Any]


class AdapterControlServicer(control_pb2_grpc.AdapterControlServiceServicer):
    """What this replica holds, its limits and its load, and the levers on them.

    started: when the replica started, in seconds of the monotonic clock
    """

    def __init__(self, serving: Serving, control: ReplicaControl, started: float) -> None:
        self._serving = serving
        self._control = control
        self._started = started
        self._version = version("multilora")

    async def LoadAdapter(
        self, request: control_pb2.LoadAdapterRequest, _context: Context
    ) -> control_pb2.LoadAdapterResponse:
        adapters = self._told(await self._control.load(request.adapter, request.path, promote=request.promote))
        first = adapters[0]
        return control_pb2.LoadAdapterResponse(identity=first.identity, tier=first.tier, adapters=adapters)

    async def UnloadAdapter(
        self, request: control_pb2.UnloadAdapterRequest, _context: Context
    ) -> control_pb2.UnloadAdapterResponse:
        cancelled = await self._control.unload(request.adapter, request.drain_timeout or None)
        return control_pb2.UnloadAdapterResponse(cancelled_requests=cancelled)

    async def PinAdapter(
        self, request: control_pb2.PinAdapterRequest, _context: Context
    ) -> control_pb2.PinAdapterResponse:
        adapters = self._told(await self._control.pin(request.adapter))
        return control_pb2.PinAdapterResponse(identity=adapters[0].identity, adapters=adapters)

    async def UnpinAdapter(
        self, request: control_pb2.UnpinAdapterRequest, _context: Context
    ) -> control_pb2.UnpinAdapterResponse:
        await self._control.unpin(request.adapter)
        return control_pb2.UnpinAdapterResponse()

    async def ListAdapters(
        self, _request: control_pb2.ListAdaptersRequest, _context: Context
    ) -> control_pb2.ListAdaptersResponse:
        stats = await self._serving.engine.stats()
        seen = [resident for resident in stats.adapters if caller().sees(tenant_of(resident.adapter.name))]
        adapters = [from_resident(resident, self._serving.model.name) for resident in seen]
        return control_pb2.ListAdaptersResponse(adapters=adapters)

    async def GetServerInfo(
        self, _request: control_pb2.GetServerInfoRequest, _context: Context
    ) -> control_pb2.GetServerInfoResponse:
        stats, limits = await self._serving.engine.stats(), self._serving.config.adapters
        return control_pb2.GetServerInfoResponse(
            version=self._version,
            model=self._serving.model.name,
            max_loras=limits.num_slots,
            max_lora_rank=limits.max_lora_rank,
            max_cpu_loras=limits.max_cpu_loras,
            requests_running=stats.running,
            requests_waiting=stats.waiting,
            kv_blocks=stats.blocks,
            kv_blocks_free=stats.blocks_free,
            block_size=stats.block_size,
            steps=stats.steps,
            slot_evictions=stats.slot_evictions,
            preemptions=stats.preemptions,
            uptime=time.monotonic() - self._started,
            max_adapters_in_step=stats.max_adapters_in_step,
        )

    def _told(self, loaded: Sequence[Loaded]) -> list[control_pb2.LoadedAdapter]:
        return [
            control_pb2.LoadedAdapter(
                identity=from_version(each.adapter, self._serving.model.name), tier=from_tier(each.tier)
            )
            for each in loaded
        ]
