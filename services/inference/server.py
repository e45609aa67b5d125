"""Puts the inference service together, and takes it down again."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import queue
import socket
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp

from multilora.inference.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from services.common.auth.guard import Guard
from services.common.auth.settings import SAME_PORT, admin_address, admin_port
from services.common.auth.tls import Tls
from services.common.errors import FailedPrecondition, NotFound, Unavailable
from services.common.gguf_config import open_gguf
from services.common.profile import check_profile, linear_shapes
from services.common.rpc import GrpcServer
from services.inference.adapters.store_client import NameClient
from services.inference.async_engine import AsyncEngine
from services.inference.config import ServerConfig
from services.inference.control_servicer import AdapterControlServicer
from services.inference.hosting.interface import EngineBuilder, EngineHost
from services.inference.hosting.model_engine import ServedEngineBuilder, model_engine
from services.inference.hosting.process import ProcessHost
from services.inference.hosting.thread import ThreadHost
from services.inference.http.app import create_app
from services.inference.model.config import ModelConfig, load_config
from services.inference.name_watch import NameWatch
from services.inference.replica_control import ReplicaControl
from services.inference.resolver import Resolver
from services.inference.servicer import InferenceServicer
from services.inference.serving import Serving
from services.inference.tokenizer import Tokenizer
from services.inference.warm_up import warm_up

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A service that answers: what it serves, and where.

    http_port: None when no HTTP is served; admin_port: `port` when it is administered there
    """

    serving: Serving
    port: int
    http_port: int | None
    admin_port: int


@contextlib.asynccontextmanager
async def serve(config: ServerConfig, build: ServedEngineBuilder = model_engine) -> AsyncIterator[RunningServer]:
    """Serve while the context is open; leaving it finishes what runs, within the grace, and takes no more.

    build: makes the engine, in the place that the settings say
    """
    started = time.monotonic()
    # what is wrong with secrets is said before a model is loaded for nothing
    guard, tls = config.security.guard("inference"), config.security.tls()
    config.store_credentials.metadata()
    model = load_config(
        config.model, name=config.served_model_name, dtype=config.model_dtype, max_model_len=config.max_model_len
    )
    build_served = functools.partial(build, config, model)
    async with _engine_host(config, build_served) as host, contextlib.AsyncExitStack() as opened:
        tokenizer = Tokenizer.load(config.model, model.eos_token_ids)
        open_gguf.cache_clear()
        await host.ready()
        servers = _servers(config, guard, tls)
        ports = [server.bind(f"{config.host}:{port}") for server, port in servers]
        grpc_server, admin_server = servers[0][0], servers[-1][0]
        http_socket = None if config.http_port is None else _listen(config.host, config.http_port)
        if http_socket is not None:
            opened.enter_context(http_socket)  # a start that is given up leaves nothing open
        names = _name_client(config, model.name)
        if names is not None:
            opened.push_async_callback(names.close)
        engine = AsyncEngine(host, config.max_unread_tokens)
        resolver = Resolver(model.name, names.resolve if names is not None else None)
        if names is not None:
            await _compare_with_profile(names, model, config.adapters.max_lora_rank)
        serving = Serving(config, model, tokenizer, resolver, engine)
        control = ReplicaControl(config.adapter_root, resolver, engine, names)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(serving), grpc_server.server)
        control_pb2_grpc.add_AdapterControlServiceServicer_to_server(
            AdapterControlServicer(serving, control, started), admin_server.server
        )
        for server, _ in servers:
            await server.start()
            opened.push_async_callback(server.stop, 1.0)
        await opened.enter_async_context(grpc_server.health_at(config.security.health_address(config.host)))
        await warm_up(control, config.warm_adapters)
        async with _http(http_socket, create_app(serving, control, grpc_server.calls, guard), tls):
            await _set_serving(servers, True)
            tasks = [asyncio.create_task(_unhealthy_when_dead(engine, servers))]
            if names is not None:
                tasks.append(asyncio.create_task(_watch_names(names, resolver, engine, config, model)))
            log.info("ready after %.1f s", time.monotonic() - started)
            try:
                http_port = None if http_socket is None else http_socket.getsockname()[1]
                yield RunningServer(serving, ports[0], http_port, ports[-1])
            finally:
                log.info("shutting down; requests have %.0f s to finish", config.shutdown_grace)
                for task in tasks:
                    task.cancel()
                await _set_serving(servers, False)
                await engine.shutdown(drain=True, timeout=config.shutdown_grace)


@contextlib.asynccontextmanager
async def _engine_host(config: ServerConfig, build: EngineBuilder) -> AsyncIterator[EngineHost]:
    """Where the engine is to run; a process loads the model while this one goes on."""
    host = ProcessHost(build) if config.engine_process else ThreadHost(build(queue.SimpleQueue()))
    try:
        yield host
    finally:
        await host.close()


async def _compare_with_profile(names: NameClient, model: ModelConfig, max_lora_rank: int) -> None:
    """Raise FailedPrecondition when the store's profile says that adapters it takes would not fit here.

    A model that is not registered yet, or a store that is away, is no reason not to serve the base model.
    """
    try:
        profile = await names.base_model()
    except (NotFound, Unavailable) as error:
        log.warning("the base model was not compared with its profile: %s", error)
        return
    check_profile(profile, linear_shapes(model.hf_config), model.vocab_size, max_lora_rank)


async def _watch_names(
    names: NameClient, resolver: Resolver, engine: AsyncEngine, config: ServerConfig, model: ModelConfig
) -> None:
    comparisons: set[asyncio.Task[None]] = set()

    async def compare() -> None:
        try:
            await _compare_with_profile(names, model, config.adapters.max_lora_rank)
        except FailedPrecondition as error:
            log.error("the base model's profile has changed, and this replica no longer meets it: %s", error)

    def base_changed() -> None:
        comparisons.add(task := asyncio.create_task(compare()))
        task.add_done_callback(comparisons.discard)

    watch = NameWatch(
        names,
        resolver,
        base_model=model.name,
        prefetch=engine.prefetch,
        drop=engine.drop,
        base_changed=base_changed,
    )
    await watch.run()


def _servers(config: ServerConfig, guard: Guard | None, tls: Tls | None) -> list[tuple[GrpcServer, int]]:
    """What to bind to which port: one server of both services, or one for each, administration last."""
    generation = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
    administration = control_pb2.DESCRIPTOR.services_by_name["AdapterControlService"].full_name
    asked = admin_port(config.admin_port, config.port)
    if asked == SAME_PORT:
        return [(GrpcServer([generation, administration], guard=guard, tls=tls), config.port)]
    server = GrpcServer([generation], guard=guard, tls=tls)
    return [
        (server, config.port),
        (GrpcServer([administration], guard=guard, tls=tls, calls=server.calls), asked),
    ]


def _name_client(config: ServerConfig, base_model: str) -> NameClient | None:
    if config.adapter_store is None:
        return None
    admin = config.adapter_store_admin or admin_address(config.adapter_store)
    return NameClient(config.adapter_store, admin, base_model, config.store_credentials)


async def _set_serving(servers: Sequence[tuple[GrpcServer, int]], serving: bool) -> None:
    for server, _ in servers:
        await server.set_serving(serving)


async def _unhealthy_when_dead(engine: AsyncEngine, servers: Sequence[tuple[GrpcServer, int]]) -> None:
    await engine.died.wait()
    await _set_serving(servers, False)


class _Uvicorn(uvicorn.Server):
    """Uvicorn beside gRPC in one loop: signals are the process's business, not its."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; uvicorn would end the process where a port is taken, and say why only in its log."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise Unavailable(
            "ADDRESS_IN_USE", f"cannot listen on {host}:{port}; another process may hold the port: {error}"
        ) from error


@contextlib.asynccontextmanager
async def _http(listening: socket.socket | None, app: ASGIApp, tls: Tls | None) -> AsyncIterator[None]:
    if listening is None:
        yield
        return
    server = _Uvicorn(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            proxy_headers=False,  # who calls is who is connected: the audit record and the limits go by that
            timeout_graceful_shutdown=2,
            ssl_context_factory=None if tls is None else lambda _config, _default: tls.http_context(),
        )
    )
    task = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        yield
    finally:
        server.should_exit = True
        await task
