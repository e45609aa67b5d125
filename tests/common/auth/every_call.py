"""Every call there is, RPC or HTTP route, tried with an empty request."""

from __future__ import annotations

from typing import Any

import grpc
import httpx
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from multilora.adapter_store.v1 import admin_pb2, store_pb2
from multilora.inference.v1 import control_pb2, inference_pb2
from services.common.rpc import from_rpc_error
from tests.common.auth.conftest import World

_FILES = (health_pb2, reflection_pb2, admin_pb2, store_pb2, inference_pb2, control_pb2)
METHODS: dict[str, Any] = {
    f"/{service.full_name}/{method.name}": method
    for file in _FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


def refusal_of(world: World, http: httpx.Client, key: str, token: str) -> str:
    """The reason of what `key`, of the permission table, is refused with; or nothing."""
    return _rpc(world, key, token) if key in METHODS else _route(world, http, key, token)


def _rpc(world: World, key: str, token: str) -> str:
    method = METHODS[key]
    client = world.client("acme-reader")
    client.token = token
    services = {
        "AdapterStoreService": world.store,
        "AdapterAdminService": world.store_admin,
        "AdapterControlService": world.inference.admin,
    }
    channel = client.channel(services.get(key.split("/")[1].rpartition(".")[2], world.inference.address))
    sends = "stream" if method.client_streaming else "unary"
    gets = "stream" if method.server_streaming else "unary"
    call = getattr(channel, f"{sends}_{gets}")(key)
    try:
        answer = call(iter(()) if method.client_streaming else b"", metadata=client.metadata, timeout=30)
        if method.server_streaming:
            next(answer, None)
            answer.cancel()
    except grpc.RpcError as error:
        return from_rpc_error(error).reason
    return ""


def _route(world: World, http: httpx.Client, key: str, token: str) -> str:
    method, path = key.split(" ")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    answer = http.request(method, f"{world.https}{path}", headers=headers, json={} if method == "POST" else None)
    if answer.status_code < 400:
        return ""
    if answer.status_code == 401:
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    return str(answer.json()["error"]["code"])
