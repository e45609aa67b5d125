"""The OpenAI-compatible face: generation, models, loads, health and metrics. The adapter is the field `model`."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from services.common.auth.callers import caller
from services.common.auth.guard import Guard
from services.common.call_metrics import CallCounts
from services.common.errors import MultiloraError
from services.common.references import tenant_of
from services.inference.conversion import check_adapter_metadata
from services.inference.http import metrics
from services.inference.http.adapter_endpoints import AdapterEndpoints
from services.inference.http.answering import Answer
from services.inference.http.body import read_object
from services.inference.http.door import Door
from services.inference.http.errors import (
    CHAT_PATH,
    LOAD_PATH,
    UNLOAD_PATH,
    on_fault,
    on_http_error,
    on_multilora_error,
)
from services.inference.http.openai import ChatRequest, CompletionRequest, OpenAIRequest
from services.inference.http.traffic_metrics import adapter_label
from services.inference.replica_control import ReplicaControl
from services.inference.serving import Serving

ADAPTER_HEADER = "x-multilora-adapter"


def create_app(serving: Serving, control: ReplicaControl, calls: CallCounts, guard: Guard | None = None) -> Starlette:
    """The application over `serving`; whoever runs it owns the socket.

    calls: the gRPC calls that /metrics tells of; guard: None lets everybody call
    """
    face, adapters = _Face(serving, calls), AdapterEndpoints(control)
    return Starlette(
        routes=[
            Route("/v1/models", face.models, methods=["GET"]),
            Route("/v1/completions", face.generation(CompletionRequest), methods=["POST"]),
            Route(CHAT_PATH, face.generation(ChatRequest), methods=["POST"]),
            Route(LOAD_PATH, adapters.load, methods=["POST"]),
            Route(UNLOAD_PATH, adapters.unload, methods=["POST"]),
            Route("/health", face.health, methods=["GET"]),
            Route("/metrics", face.metrics, methods=["GET"]),
        ],
        middleware=[] if guard is None else [Middleware(Door, guard=guard)],
        exception_handlers={
            MultiloraError: on_multilora_error,
            HTTPException: on_http_error,
            Exception: on_fault,
        },
    )


class _Face:
    def __init__(self, serving: Serving, calls: CallCounts) -> None:
        self._serving = serving
        self._calls = calls
        self._created = int(time.time())

    def generation(self, kind: type[OpenAIRequest]) -> Callable[[Request], Awaitable[Response]]:
        async def generate(request: Request) -> Response:
            asked = kind.parse(await read_object(request))
            check_adapter_metadata(request.headers.getlist(ADAPTER_HEADER), asked.model, field="model")
            return Answer(self._serving, asked)

        return generate

    async def models(self, _request: Request) -> Response:
        """The base model, and what this replica knows of the caller's and shared adapters.

        A name means its alias `stable`, as in every request.
        """
        base = self._serving.model.name
        versions: dict[str, list[int]] = {}
        for resident in (await self._serving.engine.stats()).adapters:
            if caller().sees(tenant_of(resident.adapter.name)):
                versions.setdefault(adapter_label(resident.adapter.name), []).append(resident.adapter.version)
        common = {"object": "model", "created": self._created, "owned_by": "multilora", "root": base}
        models = [{"id": base, **common, "parent": None, "max_model_len": self._serving.model.max_model_len}]
        for name, known in sorted(versions.items()):
            models.append({"id": name, **common, "parent": base, "versions": sorted(known)})
        return JSONResponse({"object": "list", "data": models})

    async def health(self, _request: Request) -> Response:
        return Response(status_code=200 if self._serving.engine.is_serving else 503)

    async def metrics(self, _request: Request) -> Response:
        stats = await self._serving.engine.stats()
        config, age = self._serving.config, self._serving.resolver.snapshot_age
        slots = config.adapters.num_slots
        page = metrics.render(stats, self._serving.traffic, slots, age, config.metrics_top_adapters, self._calls)
        return Response(page, headers={"content-type": CONTENT_TYPE_LATEST})
