"""Names of adapters, and the references by which requests ask for them.

    name            the alias `stable` of `default/name`, or of the caller's tenant
    name@3          version 3
    name:canary     the alias `canary`
    tenant/name…    the same, in another tenant

A name is what people say; below the API an adapter is its content digest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from services.common.errors import InvalidArgument

DEFAULT_TENANT = "default"
STABLE = "stable"
LATEST = "latest"

_NAME = re.compile(r"[a-z0-9]([-a-z0-9._]{0,61}[a-z0-9])?")
_RULE = "1 to 63 of a-z, 0-9, '-', '.', '_', first and last a letter or digit"


@dataclass(frozen=True, slots=True, order=True)
class AdapterName:
    """A named line of versions."""

    tenant: str
    name: str

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}"


@dataclass(frozen=True, slots=True)
class AdapterReference:
    """What a request carries: an adapter, and either a version or an alias."""

    adapter: AdapterName
    version: int | None = None
    alias: str = STABLE

    def __str__(self) -> str:
        return f"{self.adapter}@{self.version}" if self.version is not None else f"{self.adapter}:{self.alias}"


def tenant_of(full_name: str) -> str:
    """Of `tenant/name`."""
    return full_name.partition("/")[0]


def check_name(text: str, *, field: str, what: str = "name") -> str:
    """Return `text` when it is a valid name of a tenant, adapter, alias or base model, else raise InvalidArgument."""
    if not _NAME.fullmatch(text):
        raise InvalidArgument("INVALID_NAME", f"{field}: {text!r} is no valid {what}: {_RULE}", field=field)
    return text


def parse_name(text: str, *, tenant: str = DEFAULT_TENANT, field: str = "adapter") -> AdapterName:
    """Parse `name` or `tenant/name`. Raises InvalidArgument naming `field`."""
    first, slash, second = text.partition("/")
    if slash:
        return AdapterName(check_name(first, field=field, what="tenant"), check_name(second, field=field))
    return AdapterName(tenant, check_name(first, field=field, what="adapter name"))


def parse_reference(text: str, *, tenant: str = DEFAULT_TENANT, field: str = "adapter") -> AdapterReference:
    """Parse an adapter reference. Raises InvalidArgument naming `field`, with the form that is expected."""
    name, at, version = text.partition("@")
    if at:
        if not re.fullmatch(r"[1-9][0-9]{0,17}", version):
            raise InvalidArgument(
                "INVALID_REFERENCE", f"{field}: {text!r}: after '@' comes a version number, as in name@3", field=field
            )
        return AdapterReference(parse_name(name, tenant=tenant, field=field), version=int(version))
    name, colon, alias = text.partition(":")
    adapter = parse_name(name, tenant=tenant, field=field)
    return AdapterReference(adapter, alias=check_name(alias, field=field, what="alias") if colon else STABLE)
