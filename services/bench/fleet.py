"""Adapters for a load: random ones that fit the model a server serves, registered in its store."""

from __future__ import annotations

import json
from collections.abc import Sequence

import grpc.aio

from multilora.adapter_store.v1 import admin_pb2, admin_pb2_grpc
from multilora.inference.v1 import inference_pb2, inference_pb2_grpc
from services.bench import clients
from services.bench.adapters import linear_shapes, random_adapter
from services.common.auth.credentials import NONE_SHOWN, Credentials, Metadata

TENANT = "bench"
DEVIATION = 0.02
"""Of the values: the adapters say something else than the base, and stay finite in every dtype."""


def fleet_names(count: int, ranks: Sequence[int], *, first: int = 0) -> list[str]:
    """`bench/r16-0003`: number 3 of the fleet, of rank 16; ranks take turns."""
    return [f"{TENANT}/r{ranks[number % len(ranks)]}-{number:04d}" for number in range(first, first + count)]


async def register_fleet(
    store: str,
    server: str,
    count: int,
    ranks: Sequence[int],
    *,
    first: int = 0,
    credentials: Credentials = NONE_SHOWN,
) -> list[str]:
    """The fleet's names. Adapters that are registered already stay as they are: equal names are equal bytes."""
    metadata = credentials.metadata()
    async with clients.connect(store, credentials) as admin, clients.connect(server, credentials) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        model = await stub.GetModelInfo(inference_pb2.GetModelInfoRequest(), metadata=metadata)
        await register_model(admin, model.model, model.config_json, model.max_lora_rank, metadata=metadata)
        shapes = linear_shapes(json.loads(model.config_json))
        names = fleet_names(count, ranks, first=first)
        for number, name in enumerate(names, start=first):
            rank = ranks[number % len(ranks)]
            files = random_adapter(shapes, rank=rank, base_model=model.model, seed=number, deviation=DEVIATION)
            await clients.upload(admin, name, files, model.model, metadata=metadata)
    return names


async def register_model(
    admin: grpc.aio.Channel, name: str, config_json: str, max_lora_rank: int, *, metadata: Metadata = ()
) -> None:
    """The base model, unless the store has one of that name."""
    stub = admin_pb2_grpc.AdapterAdminServiceStub(admin)
    known = await stub.ListBaseModels(admin_pb2.ListBaseModelsRequest(), metadata=metadata)
    if name not in {profile.name for profile in known.base_models}:
        request = admin_pb2.RegisterBaseModelRequest(name=name, config_json=config_json, max_lora_rank=max_lora_rank)
        await stub.RegisterBaseModel(request, metadata=metadata)
