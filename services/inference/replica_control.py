"""An operator's levers on this replica's adapters: what the control service and the HTTP endpoints delegate to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from services.common.auth.callers import caller, check_own, referenced
from services.common.errors import Cancelled, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from services.common.references import parse_name
from services.inference.adapter_paths import AdapterFiles, open_adapter
from services.inference.async_engine import AsyncEngine
from services.inference.engine.adapter_control import CalledOffError
from services.inference.engine.request import AdapterVersion
from services.inference.resolver import Resolver


class Registrar(Protocol):
    """Where adapters become versions."""

    async def register(self, name: str, files: AdapterFiles, *, promote: bool) -> int:
        """Register the files under a name; the version's number. Raises what the store raises, or Unavailable."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A version that is here. tier: CPU, or GPU where a slot was free."""

    adapter: AdapterVersion
    tier: str


class ReplicaControl:
    """Loads, unloads, pins. Names are those of requests.

    root: directory beneath which paths are taken; None takes none
    registrar: None without a store
    """

    def __init__(self, root: Path | None, resolver: Resolver, engine: AsyncEngine, registrar: Registrar | None) -> None:
        self._root = root
        self._resolver = resolver
        self._engine = engine
        self._registrar = registrar
        self._draining: Counter[tuple[str, int | None]] = Counter()

    async def load(self, reference: str, path: str = "", *, promote: bool = False) -> list[Loaded]:
        """Bring here what a reference means, and show it again. With `path`, first register what lies there.

        Raises what `Resolver.resolve` raises, what the store refuses, PermissionDenied for a path outside the root, for
        any path of a tenant's caller (whoever stages files there stages them for all), and for others' adapters.
        """
        if path and not caller().every_tenant:
            raise PermissionDenied(
                "EVERY_TENANT_ONLY",
                "path: --adapter-root is every tenant's, so it takes a token of tenant `*`; upload to the store",
                field="path",
            )
        if path:
            with open_adapter(self._root, path) as files:
                reference = await self._register(reference, files, promote=promote)
        return [await self._load(version) for version in await self._versions(reference)]

    async def unload(self, reference: str, drain_timeout: float | None) -> int:
        """Hide a reference's versions here, drain and evict them; the number of requests cut off.

        drain_timeout: seconds that running requests have to finish; None waits for all of them
        """
        if drain_timeout is not None and not (math.isfinite(drain_timeout) and drain_timeout >= 0):
            raise InvalidArgument(
                "INVALID_DRAIN_TIMEOUT", "drain_timeout must be seconds, 0 or more", field="drain_timeout"
            )
        versions = await self._versions(reference)
        name, whole = versions[0].name, not {":", "@"} & set(reference)
        targets = [None] if whole else [version.version for version in versions]
        keys = [(name, target) for target in targets]
        if all(self._resolver.hidings(version) for version in versions) and not self._draining & Counter(keys):
            raise NotFound("ADAPTER_NOT_FOUND", f"adapter {reference!r} is unloaded already", field="adapter")
        for key in keys:
            self._resolver.hide(*key)
        self._draining.update(keys)
        try:
            with _typed():
                return sum([await self._engine.unload(*key, drain_timeout) for key in keys])
        finally:
            self._draining -= Counter(keys)

    async def pin(self, reference: str) -> list[Loaded]:
        """Load what a reference means, and keep it. Raises ResourceExhausted when every slot is pinned."""
        return [await self._load(version, pin=True) for version in await self._versions(reference)]

    async def unpin(self, reference: str) -> None:
        with _typed():
            for version in await self._versions(reference):
                await self._engine.unpin(version)

    async def _versions(self, reference: str) -> list[AdapterVersion]:
        adapter = referenced(reference).adapter
        check_own(adapter)
        return list((await self._resolver.meaning(reference)).versions.values())

    async def _load(self, version: AdapterVersion, *, pin: bool = False) -> Loaded:
        """What hides it when this begins is taken back; an unload that comes meanwhile has the last word."""
        hidings = self._resolver.hidings(version)
        with _typed():
            tier = await self._engine.load(version, pin=pin)
        self._resolver.show(hidings)
        return Loaded(version, tier)

    async def _register(self, name: str, files: AdapterFiles, *, promote: bool) -> str:
        """Register under a name; the reference of the version it became."""
        if self._registrar is None:
            raise FailedPrecondition(
                "NO_ADAPTER_STORE",
                "this replica has no adapter store to register adapters in; start it with --adapter-store",
                field="path",
            )
        full = str(parse_name(name, tenant=caller().home))
        number = await self._registrar.register(full, files, promote=promote)
        self._resolver.changed(full)
        return f"{full}@{number}"


@contextmanager
def _typed() -> Iterator[None]:
    try:
        yield
    except CalledOffError as error:
        raise Cancelled("CALLED_OFF", f"this call was called off: the adapter was {error}", field="adapter") from error
