"""Adapter references to versions, once per request. What a name meant lately is remembered, so that a replica serves
on while the store is away."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from services.common.errors import NotFound, Unavailable
from services.common.references import parse_reference
from services.inference.engine.request import AdapterVersion

FRESH_SECONDS = 2.0
"""How old a remembered answer may be while the store can be asked: an alias moved is followed within this time."""

MAX_REMEMBERED = 10_000

log = logging.getLogger(__name__)

Lookup = Callable[[str, str], Awaitable[AdapterVersion]]


class Resolver:
    """Resolves references against the store. `lookup(reference, routing_key)` asks it; None when there is no store."""

    def __init__(self, base_model: str, lookup: Lookup | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._base_model = base_model
        self._lookup = lookup
        self._clock = clock
        self._known: OrderedDict[tuple[str, str], tuple[float, AdapterVersion]] = OrderedDict()

    async def resolve(self, reference: str, routing_key: str = "") -> AdapterVersion | None:
        """The version a reference means right now; None is the base model.

        Raises InvalidArgument (malformed), NotFound (adapter, version or alias), FailedPrecondition (another base),
        Unavailable (the store is away and the name was not asked for before).
        """
        if not reference or reference == self._base_model:
            return None
        key = (str(parse_reference(reference)), routing_key)
        if self._lookup is None:
            raise NotFound(
                "ADAPTER_NOT_FOUND",
                f"adapter {reference!r}: this replica has no adapter store; start it with --adapter-store",
                field="adapter",
            )
        known = self._known.get(key)
        if known is not None and self._clock() - known[0] < FRESH_SECONDS:
            return known[1]
        try:
            version = await self._lookup(*key)
        except Unavailable:
            if known is None:
                raise
            log.warning("the store is away; %s still means version %d", reference, known[1].version)
            return known[1]
        except NotFound:
            self._known.pop(key, None)
            raise
        self._known[key] = (self._clock(), version)
        self._known.move_to_end(key)
        while len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)
        return version
