"""Requests to the store's values, and its records to answers."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

from multilora.adapter_store.v1 import admin_pb2
from multilora.common.v1 import common_pb2
from services.adapter_store.records import Adapter, Overrides, UploadHeader, Version
from services.common.errors import InvalidArgument
from services.common.profile import BaseModelProfile
from services.common.references import parse_name


def upload_header(header: admin_pb2.RegisterVersionHeader) -> UploadHeader:
    """Raises InvalidArgument when a name is missing or no name."""
    if not header.base_model:
        raise InvalidArgument("MISSING_FIELD", "base_model is empty; name a registered one", field="header.base_model")
    return UploadHeader(
        adapter=parse_name(header.adapter, field="header.adapter"),
        base_model=header.base_model,
        overrides=Overrides(header.force_base, header.allow_zero, header.allow_changed_base),
        promote=header.promote,
    )


def version_number(number: int) -> int:
    """Raises InvalidArgument for 0, which is an unset field."""
    if number == 0:
        raise InvalidArgument("MISSING_FIELD", "version is 0; versions count from 1", field="version")
    return number


def identity(version: Version) -> common_pb2.AdapterIdentity:
    return common_pb2.AdapterIdentity(
        adapter=str(version.adapter),
        version=version.number,
        digest=version.content.content_digest,
        pack_digest=version.content.pack_digest,
        pack_size=version.content.pack_size,
        base_model=version.content.base_model,
    )


def version_message(version: Version) -> admin_pb2.AdapterVersion:
    created_at = Timestamp()
    created_at.FromNanoseconds(version.created_ns)
    return admin_pb2.AdapterVersion(
        identity=identity(version),
        created_at=created_at,
        max_rank=version.content.max_rank,
        parameters=version.content.parameters,
        dtype=version.content.dtype,
        aliases=version.aliases,
        modules=[
            admin_pb2.BoundModule(name=module.name, rank=module.rank, scale=module.scale)
            for module in version.content.modules
        ],
        deleted=version.deleted,
    )


def adapter_message(adapter: Adapter) -> admin_pb2.Adapter:
    return admin_pb2.Adapter(
        name=str(adapter.name),
        aliases=adapter.aliases,
        latest_version=adapter.latest_version,
        num_versions=adapter.num_versions,
        base_model=adapter.base_model,
    )


def profile_message(profile: BaseModelProfile) -> admin_pb2.BaseModelProfile:
    return admin_pb2.BaseModelProfile(
        name=profile.name,
        architecture=profile.architecture,
        num_layers=profile.num_layers,
        vocab_size=profile.vocab_size,
        modules=[
            admin_pb2.ModuleShape(name=name, in_features=shape.in_features, out_features=shape.out_features)
            for name, shape in profile.modules.items()
        ],
        accepted_names=profile.accepted_names,
        max_lora_rank=profile.max_lora_rank,
        lora_extra_vocab_size=profile.lora_extra_vocab_size,
        fingerprint=profile.fingerprint,
    )
