"""AdapterAdminService: what operators and pipelines call."""

# ruff: noqa: ARG002 -- a handler takes what the contract hands it
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import closing
from functools import partial
from typing import Any, TypeVar

import grpc
import grpc.aio

from multilora.adapter_store.v1 import admin_pb2, admin_pb2_grpc
from services.adapter_store import convert
from services.adapter_store.actor import actor_of
from services.adapter_store.findings import Reason
from services.adapter_store.quota import callers_quota
from services.adapter_store.receiving import receive_files, receive_header
from services.adapter_store.store import AdapterStore
from services.common.auth.callers import caller, named, named_to_change, note
from services.common.errors import InvalidArgument
from services.common.profile import DEFAULT_LORA_RANK, profile_from_config
from services.common.references import check_name
from services.common.wire import ADMIN_SERVICE, UploadPart, parse_part

# A read and a message each, as for pulls.
DOWNLOAD_CHUNK_BYTES = 1 << 20

Context = grpc.aio.ServicerContext[Any, Any]
Result = TypeVar("Result")


class AdapterAdminServicer(admin_pb2_grpc.AdapterAdminServiceServicer):
    def __init__(self, store: AdapterStore, workers: Executor, upkeep: Executor) -> None:
        """`workers` run registrations, `upkeep` collections and checks, apart from what resolves and pulls."""
        self._store = store
        self._workers = workers
        self._upkeep = upkeep

    def add_to(self, server: grpc.aio.Server) -> None:
        admin_pb2_grpc.add_AdapterAdminServiceServicer_to_server(self, server)
        # once more, with deserialisers that leave the bytes where they are
        register: grpc.RpcMethodHandler[UploadPart | None, admin_pb2.RegisterVersionResponse]
        register = grpc.stream_unary_rpc_method_handler(
            self.RegisterVersion, parse_part, admin_pb2.RegisterVersionResponse.SerializeToString
        )
        validate: grpc.RpcMethodHandler[UploadPart | None, admin_pb2.ValidateVersionResponse]
        validate = grpc.stream_unary_rpc_method_handler(
            self.ValidateVersion, parse_part, admin_pb2.ValidateVersionResponse.SerializeToString
        )
        server.add_registered_method_handlers(ADMIN_SERVICE, {"RegisterVersion": register, "ValidateVersion": validate})

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
        register = partial(self._store.changes.register_base_model, profile, actor=actor_of(context))
        existed = await asyncio.to_thread(register)
        return admin_pb2.RegisterBaseModelResponse(profile=convert.profile_message(profile), existed=existed)

    async def ListBaseModels(
        self, request: admin_pb2.ListBaseModelsRequest, context: Context
    ) -> admin_pb2.ListBaseModelsResponse:
        profiles = await asyncio.to_thread(self._store.catalog.base_models)
        return admin_pb2.ListBaseModelsResponse(base_models=map(convert.profile_message, profiles))

    async def RegisterVersion(  # type: ignore[override]  # its requests come as parts: see add_to
        self, request_iterator: AsyncIterator[UploadPart | None], context: Context
    ) -> admin_pb2.RegisterVersionResponse:
        header = convert.upload_header(await receive_header(request_iterator))
        note(base_model=header.base_model, promote=header.promote)
        actor, quota = actor_of(context), callers_quota()
        upload = await asyncio.to_thread(self._store.registration.begin_upload, header, quota)
        await receive_files(request_iterator, upload)
        register = partial(self._store.registration.register, header, upload, actor=actor, quota=quota)
        registered = await self._finish(register, self._workers)
        note(version=registered.version.number, digest=registered.version.content.content_digest)
        return admin_pb2.RegisterVersionResponse(
            version=convert.version_message(registered.version),
            existed=registered.existed,
            warnings=registered.version.content.warnings,
        )

    async def RegisterFromUri(
        self, request: admin_pb2.RegisterFromUriRequest, context: Context
    ) -> admin_pb2.RegisterFromUriResponse:
        header = convert.upload_header(request.header)
        register = partial(self._store.registration.register_from_uri, header, request.uri, actor=actor_of(context))
        registered = await self._finish(register, self._workers)
        note(version=registered.version.number, digest=registered.version.content.content_digest)
        return admin_pb2.RegisterFromUriResponse(
            version=convert.version_message(registered.version),
            existed=registered.existed,
            warnings=registered.version.content.warnings,
        )

    async def ValidateVersion(  # type: ignore[override]  # as above
        self, request_iterator: AsyncIterator[UploadPart | None], context: Context
    ) -> admin_pb2.ValidateVersionResponse:
        header = convert.upload_header(await receive_header(request_iterator))
        upload = await asyncio.to_thread(self._store.registration.begin_upload, header)
        try:
            await receive_files(request_iterator, upload)
            validated = await self._finish(partial(self._store.registration.validate, header, upload), self._workers)
        except InvalidArgument as error:  # found before there was anything to examine
            if error.reason not in set(Reason):
                raise
            return convert.refusal_message(error)
        return convert.validated_message(validated)

    async def GetAdapter(self, request: admin_pb2.GetAdapterRequest, context: Context) -> admin_pb2.GetAdapterResponse:
        adapter = await asyncio.to_thread(self._store.catalog.adapter, named(request.adapter))
        return admin_pb2.GetAdapterResponse(adapter=convert.adapter_message(adapter))

    async def ListAdapters(
        self, request: admin_pb2.ListAdaptersRequest, context: Context
    ) -> admin_pb2.ListAdaptersResponse:
        tenants = caller().tenants
        if request.tenant:
            asked = check_name(request.tenant, field="tenant", what="tenant")
            tenants = [asked] if caller().sees(asked) else []
        adapters, token = await asyncio.to_thread(
            self._store.catalog.adapters, tenants, request.page_size, request.page_token
        )
        return admin_pb2.ListAdaptersResponse(adapters=map(convert.adapter_message, adapters), next_page_token=token)

    async def ListVersions(
        self, request: admin_pb2.ListVersionsRequest, context: Context
    ) -> admin_pb2.ListVersionsResponse:
        versions, token = await asyncio.to_thread(
            self._store.catalog.versions,
            named(request.adapter),
            include_deleted=request.include_deleted,
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return admin_pb2.ListVersionsResponse(versions=map(convert.version_message, versions), next_page_token=token)

    async def GetVersion(self, request: admin_pb2.GetVersionRequest, context: Context) -> admin_pb2.GetVersionResponse:
        name, number = named(request.adapter), convert.version_number(request.version)
        version = await asyncio.to_thread(self._store.catalog.version, name, number)
        return admin_pb2.GetVersionResponse(version=convert.version_message(version))

    async def GetHistory(self, request: admin_pb2.GetHistoryRequest, context: Context) -> admin_pb2.GetHistoryResponse:
        entries, token = await asyncio.to_thread(
            self._store.history, named(request.adapter), request.page_size, request.page_token
        )
        return admin_pb2.GetHistoryResponse(
            entries=[convert.history_message(seq, entry) for seq, entry in entries], next_page_token=token
        )

    async def SetAlias(self, request: admin_pb2.SetAliasRequest, context: Context) -> admin_pb2.SetAliasResponse:
        change = partial(
            self._store.changes.set_alias,
            named_to_change(request.adapter),
            request.alias,
            convert.targets(request.targets),
            expected_revision=convert.expected_revision(request),
            actor=actor_of(context),
        )
        return admin_pb2.SetAliasResponse(adapter=convert.adapter_message(await asyncio.to_thread(change)))

    async def DeleteAlias(
        self, request: admin_pb2.DeleteAliasRequest, context: Context
    ) -> admin_pb2.DeleteAliasResponse:
        change = partial(
            self._store.changes.delete_alias,
            named_to_change(request.adapter),
            request.alias,
            expected_revision=convert.expected_revision(request),
            actor=actor_of(context),
        )
        return admin_pb2.DeleteAliasResponse(adapter=convert.adapter_message(await asyncio.to_thread(change)))

    async def DeleteVersion(
        self, request: admin_pb2.DeleteVersionRequest, context: Context
    ) -> admin_pb2.DeleteVersionResponse:
        name, number = named_to_change(request.adapter), convert.version_number(request.version)
        await asyncio.to_thread(partial(self._store.changes.delete_version, name, number, actor=actor_of(context)))
        return admin_pb2.DeleteVersionResponse()

    async def UndeleteVersion(
        self, request: admin_pb2.UndeleteVersionRequest, context: Context
    ) -> admin_pb2.UndeleteVersionResponse:
        name, number = named_to_change(request.adapter), convert.version_number(request.version)
        await asyncio.to_thread(partial(self._store.changes.undelete_version, name, number, actor=actor_of(context)))
        version = await asyncio.to_thread(self._store.catalog.version, name, number)
        return admin_pb2.UndeleteVersionResponse(version=convert.version_message(version))

    async def DownloadVersion(
        self, request: admin_pb2.DownloadVersionRequest, context: Context
    ) -> AsyncIterator[admin_pb2.DownloadVersionResponse]:
        name, number = named(request.adapter), convert.version_number(request.version)
        reader = await asyncio.to_thread(self._store.open_file, name, number, request.file)
        with closing(reader):
            offset, total_size = 0, reader.size
            while data := await asyncio.to_thread(reader.read, offset, DOWNLOAD_CHUNK_BYTES):
                yield admin_pb2.DownloadVersionResponse(data=data, total_size=total_size)
                offset, total_size = offset + len(data), 0

    async def CollectGarbage(
        self, request: admin_pb2.CollectGarbageRequest, context: Context
    ) -> admin_pb2.CollectGarbageResponse:
        collect = partial(self._store.collection.collect, dry_run=request.dry_run, actor=actor_of(context))
        found = await self._finish(collect, self._upkeep)
        return admin_pb2.CollectGarbageResponse(
            blobs=found.blobs, bytes=found.bytes, versions=found.versions, digests=found.digests
        )

    async def VerifyIntegrity(
        self, request: admin_pb2.VerifyIntegrityRequest, context: Context
    ) -> admin_pb2.VerifyIntegrityResponse:
        found = await self._finish(self._store.verify, self._upkeep)
        return admin_pb2.VerifyIntegrityResponse(
            blobs=found.blobs, bytes=found.bytes, entries=found.entries, problems=found.problems
        )

    async def GetStats(self, request: admin_pb2.GetStatsRequest, context: Context) -> admin_pb2.GetStatsResponse:
        totals = await asyncio.to_thread(self._store.catalog.totals)
        blob_bytes = await asyncio.to_thread(self._store.blob_bytes)
        return admin_pb2.GetStatsResponse(
            adapters=totals.adapters, versions=totals.versions, base_models=totals.base_models, blob_bytes=blob_bytes
        )

    async def _finish(self, work: Callable[[], Result], threads: Executor) -> Result:
        """Run work to its end even when its caller goes away: a registration cleans up after itself."""
        return await asyncio.shield(asyncio.wrap_future(threads.submit(work)))
