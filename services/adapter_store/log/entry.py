"""Entries of the log: one change of one adapter or base model, with who and when, as a line of JSON.

    {"format": 1, "id": "<32 hex>", "kind": "alias", "at_ns": …, "actor": "…", …the kind's own fields}

The id tells a writer whose answer was lost whether the entry that is there is its own. A reader refuses what it does
not know: an entry that was skipped would make another truth.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from services.adapter_store.records import BoundModule, VersionContent
from services.common.errors import DataLoss
from services.common.profile import BaseModelProfile
from services.common.references import STABLE
from services.common.split import Target

FORMAT = 1


@dataclass(frozen=True, slots=True)
class VersionAdded:
    """A registration. stable: the alias `stable` points to it from then on, in the same commit."""

    kind: ClassVar[str] = "version"
    number: int
    content: VersionContent
    stable: bool


@dataclass(frozen=True, slots=True)
class AliasSet:
    kind: ClassVar[str] = "alias"
    alias: str
    targets: tuple[Target, ...]


@dataclass(frozen=True, slots=True)
class AliasDeleted:
    kind: ClassVar[str] = "alias_deleted"
    alias: str


@dataclass(frozen=True, slots=True)
class VersionDeleted:
    """Its grace period begins at the entry's time."""

    kind: ClassVar[str] = "version_deleted"
    number: int


@dataclass(frozen=True, slots=True)
class VersionUndeleted:
    kind: ClassVar[str] = "version_undeleted"
    number: int


@dataclass(frozen=True, slots=True)
class VersionCollected:
    """Its bytes are given up, from before the first of them is removed."""

    kind: ClassVar[str] = "version_collected"
    number: int


@dataclass(frozen=True, slots=True)
class BaseModelSet:
    """The whole profile, as it is from then on."""

    kind: ClassVar[str] = "base_model"
    profile: BaseModelProfile


Body = VersionAdded | AliasSet | AliasDeleted | VersionDeleted | VersionUndeleted | VersionCollected | BaseModelSet


@dataclass(frozen=True, slots=True)
class Entry:
    """One change. at_ns: nanoseconds since 1970, by the writer's clock; actor: who asked for it, empty if unknown."""

    body: Body
    at_ns: int
    actor: str = ""
    id: str = field(default_factory=lambda: secrets.token_hex(16))


def subject(body: Body) -> tuple[int, str, tuple[Target, ...]]:
    """What a change is about: the version (0: none), the alias (empty: none), and where that points since."""
    match body:
        case VersionAdded(number, _, stable):
            return (number, STABLE, (Target(number),)) if stable else (number, "", ())
        case AliasSet(alias, targets):
            return 0, alias, targets
        case AliasDeleted(alias):
            return 0, alias, ()
        case BaseModelSet():
            return 0, "", ()
        case _:
            return body.number, "", ()


def encode(entry: Entry) -> bytes:
    head = {"format": FORMAT, "id": entry.id, "kind": entry.body.kind, "at_ns": entry.at_ns, "actor": entry.actor}
    return json.dumps(head | _fields(entry.body), separators=(",", ":")).encode()


def decode(data: bytes, where: str) -> Entry:
    """Raises DataLoss naming `where` when it is no entry, or one of a format or kind that is not known."""
    try:
        fields = json.loads(data)
        if fields["format"] != FORMAT:
            raise DataLoss("LOG_FORMAT_UNKNOWN", f"{where} has format {fields['format']}; run a newer adapter store")
        body, head = _body(fields), (fields["at_ns"], fields["actor"], fields["id"])
        _check(body, head)
        return Entry(body, *head)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataLoss("LOG_ENTRY_BROKEN", f"{where} is no entry of a log: {error!r}; restore it") from error


def _check(body: Body, head: tuple[int, str, str]) -> None:
    """Raise TypeError unless every value is of its field's type: what folds an entry does not look again."""
    number, alias, targets = subject(body)
    expected: list[tuple[tuple[object, ...], type]] = [
        (head[:1], int),
        (head[1:], str),
        ((number, *(value for target in targets for value in (target.version, target.weight))), int),
        ((alias,), str),
    ]
    if isinstance(body, VersionAdded):
        content = body.content
        digests = (content.content_digest, content.config_digest, content.weights_digest, content.pack_digest)
        expected += [
            ((*digests, content.weights_header_digest, content.base_model, content.dtype, *content.warnings), str),
            ((content.pack_size, content.max_rank, content.parameters), int),
            ((body.stable,), bool),
            (tuple(module.name for module in content.modules), str),
            (tuple(module.rank for module in content.modules), int),
            (tuple(module.scale for module in content.modules), float),
        ]
    for values, kind in expected:
        for value in values:
            if type(value) is not kind:
                raise TypeError(f"{value!r:.100} is no {kind.__name__}")


def content_fields(content: VersionContent) -> dict[str, Any]:
    """A version's content as JSON values; modules are rows, as there are hundreds. What came later is left out where
    it says nothing, so that older versions read as they were written."""
    fields = asdict(content)
    if not content.weights_header_digest:
        del fields["weights_header_digest"]
    fields["modules"] = [[module.name, module.rank, module.scale] for module in content.modules]
    return fields


def content_of(fields: dict[str, Any]) -> VersionContent:
    modules = tuple(BoundModule(*row) for row in fields.get("modules", ()))
    return VersionContent(**fields | {"modules": modules, "warnings": tuple(fields["warnings"])})


def _fields(body: Body) -> dict[str, Any]:
    match body:
        case VersionAdded(number, content, stable):
            return {"version": number, "stable": stable, "content": content_fields(content)}
        case AliasSet(alias, targets):
            return {"alias": alias, "targets": [[target.version, target.weight] for target in targets]}
        case AliasDeleted(alias):
            return {"alias": alias}
        case BaseModelSet(profile):
            return {"profile": json.loads(profile.to_json())}
        case _:
            return {"version": body.number}


def _body(fields: dict[str, Any]) -> Body:
    match fields["kind"]:
        case "version":
            return VersionAdded(fields["version"], content_of(fields["content"]), fields["stable"])
        case "alias":
            return AliasSet(fields["alias"], tuple(Target(*target) for target in fields["targets"]))
        case "alias_deleted":
            return AliasDeleted(fields["alias"])
        case "version_deleted":
            return VersionDeleted(fields["version"])
        case "version_undeleted":
            return VersionUndeleted(fields["version"])
        case "version_collected":
            return VersionCollected(fields["version"])
        case "base_model":
            return BaseModelSet(BaseModelProfile.from_json(json.dumps(fields["profile"])))
        case kind:
            raise ValueError(f"kind {kind!r} is not known")
