"""Requests to the store's values, and its records to answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from multilora.adapter_store.v1 import admin_pb2, store_pb2
from multilora.common.v1 import common_pb2
from services.adapter_store.feed import Changed, Event, Heartbeat, Reset
from services.adapter_store.findings import Finding
from services.adapter_store.log.entry import Entry, subject
from services.adapter_store.records import Adapter, BoundModule, Overrides, UploadHeader, Validated, Version
from services.adapter_store.streams import ADAPTERS, BASE_MODELS, ChangeRecord
from services.common.auth.callers import caller, check_own
from services.common.errors import InvalidArgument
from services.common.profile import BaseModelProfile
from services.common.references import parse_name
from services.common.split import Target, pick

MAX_TARGETS = 16
MAX_FINDINGS = 1000
KINDS = {
    "version": common_pb2.CHANGE_KIND_VERSION,
    "alias": common_pb2.CHANGE_KIND_ALIAS,
    "alias_deleted": common_pb2.CHANGE_KIND_ALIAS_DELETED,
    "version_deleted": common_pb2.CHANGE_KIND_VERSION_DELETED,
    "version_undeleted": common_pb2.CHANGE_KIND_VERSION_UNDELETED,
    "version_collected": common_pb2.CHANGE_KIND_VERSION_COLLECTED,
    "base_model": common_pb2.CHANGE_KIND_BASE_MODEL,
}


def upload_header(header: admin_pb2.RegisterVersionHeader) -> UploadHeader:
    """Raises InvalidArgument when a name is missing or no name, PermissionDenied for another tenant's."""
    if not header.base_model:
        raise InvalidArgument("MISSING_FIELD", "base_model is empty; name a registered one", field="header.base_model")
    adapter = parse_name(header.adapter, tenant=caller().home, field="header.adapter")
    check_own(adapter, field="header.adapter")
    return UploadHeader(
        adapter=adapter,
        base_model=header.base_model,
        overrides=Overrides(header.force_base, header.allow_zero, header.allow_changed_base),
        promote=header.promote,
    )


def version_number(number: int) -> int:
    """Raises InvalidArgument for 0, which is an unset field."""
    if number == 0:
        raise InvalidArgument("MISSING_FIELD", "version is 0; versions count from 1", field="version")
    return number


def targets(messages: Sequence[admin_pb2.WeightedVersion]) -> list[Target]:
    """Raises InvalidArgument when there are none or too many, one twice, or one without a weight among several."""
    if not messages:
        raise InvalidArgument("MISSING_FIELD", "targets is empty; name one version", field="targets")
    if len(messages) > MAX_TARGETS:
        raise InvalidArgument(
            "TOO_MANY_TARGETS",
            f"targets has {len(messages)} versions; at most {MAX_TARGETS} are taken",
            field="targets",
        )
    found = [Target(version_number(message.version), message.weight) for message in messages]
    if len(found) == 1:
        return [Target(found[0].version)]
    for target in found:
        if target.weight == 0:
            raise InvalidArgument(
                "INVALID_WEIGHT",
                f"version {target.version} has weight 0; give it 1 or more, or leave it out",
                field="targets",
            )
    if len({target.version for target in found}) < len(found):
        raise InvalidArgument("DUPLICATE_TARGET", "targets names a version twice; add its weights up", field="targets")
    return found


def expected_revision(request: admin_pb2.SetAliasRequest | admin_pb2.DeleteAliasRequest) -> int | None:
    return request.expected_revision if request.HasField("expected_revision") else None


def timestamp(nanoseconds: int) -> Timestamp:
    made = Timestamp()
    made.FromNanoseconds(nanoseconds)
    return made


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
    return admin_pb2.AdapterVersion(
        identity=identity(version),
        created_at=timestamp(version.created_ns),
        max_rank=version.content.max_rank,
        parameters=version.content.parameters,
        dtype=version.content.dtype,
        aliases=version.aliases,
        modules=map(_module_message, version.content.modules),
        deleted=version.deleted,
        collected=version.collected,
    )


def adapter_message(adapter: Adapter) -> admin_pb2.Adapter:
    return admin_pb2.Adapter(
        name=str(adapter.name),
        aliases={alias: max(to, key=lambda target: target.weight).version for alias, to in adapter.aliases.items()},
        latest_version=adapter.latest_version,
        num_versions=adapter.num_versions,
        base_model=adapter.base_model,
        revision=adapter.revision,
        alias_targets=[
            admin_pb2.Alias(name=alias, targets=target_messages(adapter.aliases[alias]))
            for alias in sorted(adapter.aliases)
        ],
    )


def target_messages(targets: Sequence[Target]) -> list[admin_pb2.WeightedVersion]:
    return [admin_pb2.WeightedVersion(version=target.version, weight=target.weight) for target in targets]


def validated_message(validated: Validated) -> admin_pb2.ValidateVersionResponse:
    return admin_pb2.ValidateVersionResponse(
        findings=map(_finding_message, validated.findings[:MAX_FINDINGS]),
        modules=map(_module_message, validated.modules),
        warnings=validated.warnings,
        digest=validated.content_digest,
        finding_count=len(validated.findings),
    )


def refusal_message(error: InvalidArgument) -> admin_pb2.ValidateVersionResponse:
    """The one finding of an upload that broke off."""
    finding = admin_pb2.Finding(reason=error.reason, message=error.message, facts=error.metadata)
    return admin_pb2.ValidateVersionResponse(findings=[finding], finding_count=1)


def _finding_message(finding: Finding) -> admin_pb2.Finding:
    facts = {key: str(value) for key, value in finding.facts.items()}
    return admin_pb2.Finding(reason=finding.reason, message=finding.message, facts=facts)


def _module_message(module: BoundModule) -> admin_pb2.BoundModule:
    return admin_pb2.BoundModule(name=module.name, rank=module.rank, scale=module.scale)


def history_message(seq: int, entry: Entry) -> admin_pb2.HistoryEntry:
    version, alias, targets = subject(entry.body)
    return admin_pb2.HistoryEntry(
        revision=seq,
        changed_at=timestamp(entry.at_ns),
        actor=entry.actor,
        kind=KINDS[entry.body.kind],
        version=version,
        alias=alias,
        targets=target_messages(targets),
    )


def resolved_message(
    reference: str, versions: Mapping[Target, Version], routing_key: str
) -> store_pb2.ResolveAdapterResponse:
    """`reference` in full; the version meant is picked here, and can be picked again from `targets`."""
    chosen = pick(list(versions), reference, routing_key)
    version = next(version for target, version in versions.items() if target.version == chosen)
    return store_pb2.ResolveAdapterResponse(
        identity=identity(version),
        max_rank=version.content.max_rank,
        targets=[
            store_pb2.ResolvedTarget(identity=identity(version), weight=target.weight)
            for target, version in versions.items()
        ],
        reference=reference,
    )


def watch_message(event: Event) -> store_pb2.WatchAdaptersResponse:
    match event:
        case Reset(position):
            return store_pb2.WatchAdaptersResponse(revision=position.revision, epoch=position.epoch, reset=True)
        case Heartbeat(position):
            return store_pb2.WatchAdaptersResponse(revision=position.revision, epoch=position.epoch, heartbeat=True)
        case Changed(epoch, change):
            record = ChangeRecord.from_json(change.change)
            is_adapter = change.stream.startswith(ADAPTERS)
            return store_pb2.WatchAdaptersResponse(
                revision=change.revision,
                epoch=epoch,
                adapter=change.stream.removeprefix(ADAPTERS) if is_adapter else "",
                base_model="" if is_adapter else change.stream.removeprefix(BASE_MODELS),
                kind=KINDS[record.kind],
                version=record.version,
                alias=record.alias,
                actor=record.actor,
                changed_at=timestamp(record.at_ns),
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
