"""The errors about names and versions, worded once for every index backend."""

from __future__ import annotations

from collections.abc import Iterable

from services.common.errors import AlreadyExists, FailedPrecondition, NotFound
from services.common.references import STABLE, AdapterName


def version_not_found(adapter: AdapterName, number: int, latest: int) -> NotFound:
    hint = f"its newest is {latest}" if latest else "all of its versions are deleted"
    return NotFound("VERSION_NOT_FOUND", f"{adapter} has no version {number}; {hint}", adapter=adapter, version=number)


def no_versions(adapter: AdapterName) -> NotFound:
    return NotFound("VERSION_NOT_FOUND", f"all versions of {adapter} are deleted; register a new one", adapter=adapter)


def version_deleted(adapter: AdapterName, number: int) -> NotFound:
    return NotFound(
        "VERSION_DELETED",
        f"version {number} of {adapter} is deleted; ask for another, or register it again",
        adapter=adapter,
        version=number,
    )


def alias_not_found(adapter: AdapterName, alias: str, aliases: Iterable[str]) -> NotFound:
    there = ", ".join([*aliases, "latest"])
    return NotFound(
        "ALIAS_NOT_FOUND",
        f"{adapter} has no alias {alias!r}; it has {there}; a version is asked for as {adapter.name}@3",
        adapter=adapter,
        alias=alias,
    )


def version_in_use(adapter: AdapterName, number: int, aliases: Iterable[str]) -> FailedPrecondition:
    names = ", ".join(aliases)
    return FailedPrecondition(
        "VERSION_IN_USE",
        f"version {number} of {adapter} is what {names} points to; point {names} elsewhere first",
        adapter=adapter,
        version=number,
        aliases=names,
    )


def version_collected(adapter: AdapterName, number: int) -> FailedPrecondition:
    return FailedPrecondition(
        "VERSION_COLLECTED",
        f"version {number} of {adapter} was deleted and its bytes are gone; register it again",
        field="version",
        adapter=adapter,
        version=number,
    )


def content_lives(adapter: AdapterName, number: int, other: int) -> FailedPrecondition:
    return FailedPrecondition(
        "CONTENT_LIVES",
        f"version {other} of {adapter} has the content of version {number}; use that one, or delete it first",
        field="version",
        adapter=adapter,
        version=other,
    )


def stable_in_use(adapter: AdapterName, others: Iterable[int]) -> FailedPrecondition:
    numbers = ", ".join(map(str, others))
    return FailedPrecondition(
        "STABLE_IN_USE",
        f"{adapter} means its {STABLE} to whoever names no version; move it, or delete versions {numbers} first if the "
        "adapter shall go",
        field="alias",
        adapter=adapter,
        versions=numbers,
    )


def revision_conflict(adapter: AdapterName, expected: int, found: int) -> FailedPrecondition:
    return FailedPrecondition(
        "REVISION_CONFLICT",
        f"{adapter} is at revision {found}, not {expected}: another changed it; look at it again, then decide",
        field="expected_revision",
        adapter=adapter,
        revision=found,
    )


def base_model_not_found(name: str, known: Iterable[str]) -> NotFound:
    there = ", ".join(known) or "none"
    return NotFound(
        "BASE_MODEL_NOT_FOUND",
        f"there is no base model {name!r}; registered: {there}; register it first",
        field="base_model",
        base_model=name,
    )


def named_like_base_model(adapter: AdapterName) -> AlreadyExists:
    return AlreadyExists(
        "NAME_TAKEN",
        f"{adapter.name} is a base model's name, and a request for it means that model; choose another",
        field="adapter",
        adapter=adapter,
    )


def named_like_adapter(name: str, adapter: AdapterName) -> AlreadyExists:
    return AlreadyExists(
        "NAME_TAKEN",
        f"{name} is already the adapter {adapter}; choose another name for the base model",
        field="name",
        adapter=adapter,
    )


def base_model_differs(name: str, fields: Iterable[str]) -> AlreadyExists:
    which = ", ".join(fields)
    return AlreadyExists(
        "BASE_MODEL_EXISTS",
        f"base model {name} is registered with other values of {which}; its versions were checked against those, "
        "and only a higher max_lora_rank and more accepted_names are taken; register this one under another name",
        field="name",
        differs=which,
    )
