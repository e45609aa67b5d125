"""AdapterAdminService: what operators and pipelines call."""

# ruff: noqa: ARG002 -- a handler takes what the contract hands it
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

import grpc.aio

from multilora.adapter_store.v1 import admin_pb2, admin_pb2_grpc
from services.adapter_store import convert
from services.adapter_store.store import AdapterStore
from services.adapter_store.upload import Upload
from services.common.errors import InvalidArgument, Unimplemented
from services.common.profile import DEFAULT_LORA_RANK, profile_from_config
from services.common.references import parse_name

Context = grpc.aio.ServicerContext[Any, Any]
Result = TypeVar("Result")


class AdapterAdminServicer(admin_pb2_grpc.AdapterAdminServiceServicer):
    def __init__(self, store: AdapterStore, registrations: Executor) -> None:
        """`registrations` runs validation and packing, apart from the threads that resolve and pull."""
        self._store = store
        self._registrations = registrations

    async def RegisterBaseModel(
        self, request: admin_pb2.RegisterBaseModelRequest, context: Context
    ) -> admin_pb2.RegisterBaseModelResponse:
        profile = profile_from_config(
            request.name,
            request.config_json,
            accepted_names=request.accepted_names,
            max_lora_rank=request.max_lora_rank if request.HasField("max_lora_rank") else DEFAULT_LORA_RANK,
            lora_extra_vocab_size=request.lora_extra_vocab_size,
            fingerprint=request.fingerprint,
        )
        existed = await asyncio.to_thread(self._store.register_base_model, profile)
        return admin_pb2.RegisterBaseModelResponse(profile=convert.profile_message(profile), existed=existed)

    async def ListBaseModels(
        self, request: admin_pb2.ListBaseModelsRequest, context: Context
    ) -> admin_pb2.ListBaseModelsResponse:
        profiles = await asyncio.to_thread(self._store.base_models)
        return admin_pb2.ListBaseModelsResponse(base_models=map(convert.profile_message, profiles))

    async def RegisterVersion(
        self, request_iterator: AsyncIterator[admin_pb2.RegisterVersionRequest], context: Context
    ) -> admin_pb2.RegisterVersionResponse:
        header = convert.upload_header(await _header(request_iterator))
        upload = await asyncio.to_thread(self._store.begin_upload, header)
        try:
            await _receive(request_iterator, upload)
        except BaseException:  # a cancelled call, too
            await asyncio.to_thread(upload.discard)
            raise
        registered = await self._finish(lambda: self._store.register(header, upload))
        return admin_pb2.RegisterVersionResponse(
            version=convert.version_message(registered.version),
            existed=registered.existed,
            warnings=registered.version.content.warnings,
        )

    async def RegisterFromUri(
        self, request: admin_pb2.RegisterFromUriRequest, context: Context
    ) -> admin_pb2.RegisterFromUriResponse:
        header = convert.upload_header(request.header)
        registered = await self._finish(lambda: self._store.register_from_uri(header, request.uri))
        return admin_pb2.RegisterFromUriResponse(
            version=convert.version_message(registered.version),
            existed=registered.existed,
            warnings=registered.version.content.warnings,
        )

    async def GetAdapter(self, request: admin_pb2.GetAdapterRequest, context: Context) -> admin_pb2.GetAdapterResponse:
        adapter = await asyncio.to_thread(self._store.adapter, parse_name(request.adapter))
        return admin_pb2.GetAdapterResponse(adapter=convert.adapter_message(adapter))

    async def ListAdapters(
        self, request: admin_pb2.ListAdaptersRequest, context: Context
    ) -> admin_pb2.ListAdaptersResponse:
        adapters, token = await asyncio.to_thread(
            self._store.adapters, request.tenant, request.page_size, request.page_token
        )
        return admin_pb2.ListAdaptersResponse(adapters=map(convert.adapter_message, adapters), next_page_token=token)

    async def ListVersions(
        self, request: admin_pb2.ListVersionsRequest, context: Context
    ) -> admin_pb2.ListVersionsResponse:
        versions, token = await asyncio.to_thread(
            self._store.versions,
            parse_name(request.adapter),
            include_deleted=request.include_deleted,
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return admin_pb2.ListVersionsResponse(versions=map(convert.version_message, versions), next_page_token=token)

    async def GetVersion(self, request: admin_pb2.GetVersionRequest, context: Context) -> admin_pb2.GetVersionResponse:
        name, number = parse_name(request.adapter), convert.version_number(request.version)
        version = await asyncio.to_thread(self._store.version, name, number)
        return admin_pb2.GetVersionResponse(version=convert.version_message(version))

    async def SetAlias(self, request: admin_pb2.SetAliasRequest, context: Context) -> admin_pb2.SetAliasResponse:
        name, number = parse_name(request.adapter), _only_target(request)
        adapter = await asyncio.to_thread(self._store.set_alias, name, request.alias, number)
        return admin_pb2.SetAliasResponse(adapter=convert.adapter_message(adapter))

    async def DeleteVersion(
        self, request: admin_pb2.DeleteVersionRequest, context: Context
    ) -> admin_pb2.DeleteVersionResponse:
        name, number = parse_name(request.adapter), convert.version_number(request.version)
        await asyncio.to_thread(self._store.delete_version, name, number)
        return admin_pb2.DeleteVersionResponse()

    async def GetStats(self, request: admin_pb2.GetStatsRequest, context: Context) -> admin_pb2.GetStatsResponse:
        counts = await asyncio.to_thread(self._store.counts)
        blob_bytes = await asyncio.to_thread(self._store.blob_bytes)
        return admin_pb2.GetStatsResponse(
            adapters=counts.adapters, versions=counts.versions, base_models=counts.base_models, blob_bytes=blob_bytes
        )

    async def DownloadVersion(
        self, request: admin_pb2.DownloadVersionRequest, context: Context
    ) -> AsyncIterator[admin_pb2.DownloadVersionResponse]:
        raise Unimplemented.not_yet("DownloadVersion")
        yield  # a stream's handler is a generator

    async def DeleteAlias(
        self, request: admin_pb2.DeleteAliasRequest, context: Context
    ) -> admin_pb2.DeleteAliasResponse:
        raise Unimplemented.not_yet("DeleteAlias")

    async def UndeleteVersion(
        self, request: admin_pb2.UndeleteVersionRequest, context: Context
    ) -> admin_pb2.UndeleteVersionResponse:
        raise Unimplemented.not_yet("UndeleteVersion")

    async def CollectGarbage(
        self, request: admin_pb2.CollectGarbageRequest, context: Context
    ) -> admin_pb2.CollectGarbageResponse:
        raise Unimplemented.not_yet("CollectGarbage")

    async def VerifyIntegrity(
        self, request: admin_pb2.VerifyIntegrityRequest, context: Context
    ) -> admin_pb2.VerifyIntegrityResponse:
        raise Unimplemented.not_yet("VerifyIntegrity")

    async def _finish(self, register: Callable[[], Result]) -> Result:
        """Run a registration to its end even when its caller goes away: it owns the upload and cleans up after it."""
        return await asyncio.shield(asyncio.wrap_future(self._registrations.submit(register)))


async def _header(requests: AsyncIterator[admin_pb2.RegisterVersionRequest]) -> admin_pb2.RegisterVersionHeader:
    async for request in requests:
        if request.WhichOneof("part") == "header":
            return request.header
        break
    raise InvalidArgument("MISSING_HEADER", "the first message of an upload is its header", field="header")


async def _receive(requests: AsyncIterator[admin_pb2.RegisterVersionRequest], upload: Upload) -> None:
    async for request in requests:
        if request.WhichOneof("part") != "chunk":
            raise InvalidArgument("MISSING_CHUNK", "after the header only chunks come", field="chunk")
        await asyncio.to_thread(upload.write, request.chunk.file, request.chunk.data)


def _only_target(request: admin_pb2.SetAliasRequest) -> int:
    if not request.targets:
        raise InvalidArgument("MISSING_FIELD", "targets is empty; name one version", field="targets")
    if len(request.targets) > 1:
        raise Unimplemented.not_yet("targets with several versions")
    return convert.version_number(request.targets[0].version)
