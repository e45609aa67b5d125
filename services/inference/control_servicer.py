"""AdapterControlService: what is resident on this replica, from the engine's own state."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any, NoReturn

import grpc.aio

from multilora.inference.v1 import control_pb2, control_pb2_grpc
from services.common.errors import Unimplemented
from services.inference.conversion import from_resident
from services.inference.serving import Serving

Context = grpc.aio.ServicerContext[Any, Any]


class AdapterControlServicer(control_pb2_grpc.AdapterControlServiceServicer):
    """What this replica holds, its limits and its load.

    started: when the replica started, in seconds of the monotonic clock
    """

    def __init__(self, serving: Serving, started: float) -> None:
        self._serving = serving
        self._started = started
        self._version = version("multilora")

    async def LoadAdapter(self, _request: control_pb2.LoadAdapterRequest, _context: Context) -> NoReturn:
        raise Unimplemented.not_yet("LoadAdapter")

    async def UnloadAdapter(self, _request: control_pb2.UnloadAdapterRequest, _context: Context) -> NoReturn:
        raise Unimplemented.not_yet("UnloadAdapter")

    async def PinAdapter(self, _request: control_pb2.PinAdapterRequest, _context: Context) -> NoReturn:
        raise Unimplemented.not_yet("PinAdapter")

    async def UnpinAdapter(self, _request: control_pb2.UnpinAdapterRequest, _context: Context) -> NoReturn:
        raise Unimplemented.not_yet("UnpinAdapter")

    async def ListAdapters(
        self, _request: control_pb2.ListAdaptersRequest, _context: Context
    ) -> control_pb2.ListAdaptersResponse:
        stats = await self._serving.engine.stats()
        adapters = [from_resident(resident, self._serving.model.name) for resident in stats.adapters]
        return control_pb2.ListAdaptersResponse(adapters=adapters)

    async def GetServerInfo(
        self, _request: control_pb2.GetServerInfoRequest, _context: Context
    ) -> control_pb2.GetServerInfoResponse:
        stats, limits = await self._serving.engine.stats(), self._serving.config.adapters
        return control_pb2.GetServerInfoResponse(
            version=self._version,
            model=self._serving.model.name,
            max_loras=limits.max_loras,
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
