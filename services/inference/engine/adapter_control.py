"""An operator's commands about adapters, from their arrival to their answer, some steps later."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from services.inference.engine.interfaces import Adapters
from services.inference.engine.messages import (
    AdapterCommand,
    AdapterReply,
    EngineOutput,
    LoadAdapter,
    UnloadAdapter,
    UnpinAdapter,
)
from services.inference.engine.request import AdapterVersion, Request


class CalledOffError(Exception):
    """A command was overtaken by a later one."""


@dataclass(slots=True)
class _Drain:
    """An unload under way. deadline: when its requests are cancelled; reply_ids: who waits for it"""

    name: str
    version: int | None
    deadline: float | None
    reply_ids: list[int] = field(default_factory=list)


class AdapterControl:
    """Loads that wait for their adapter, and unloads that wait for their requests.

    A load during an unload calls the unload off, an unload during a load the load; an unload during the same unload
    waits with it, and the earlier deadline holds.

    requests_of: the requests of an adapter's version, or of all versions; cancel: ends one; tell: takes the answers
    """

    def __init__(
        self,
        adapters: Adapters,
        clock: Callable[[], float],
        requests_of: Callable[[str, int | None], Iterable[Request]],
        cancel: Callable[[Request], None],
        tell: Callable[[EngineOutput], None],
    ) -> None:
        self._adapters = adapters
        self._clock = clock
        self._requests_of = requests_of
        self._cancel = cancel
        self._tell = tell
        self._loads: list[LoadAdapter] = []
        self._drains: list[_Drain] = []

    def handle(self, command: AdapterCommand) -> None:
        """Begin; whoever asked is answered here or by `advance`."""
        match command:
            case LoadAdapter(adapter=adapter):
                self._call_off_drains(adapter)
                self._loads.append(command)
            case UnpinAdapter(reply_id, adapter):
                self._adapters.unpin(adapter)
                self._tell(AdapterReply(reply_id))
            case UnloadAdapter():
                self._unload(command)

    def advance(self) -> None:
        """Go on with everything begun, as far as it goes now."""
        self._loads = [load for load in self._loads if not self._advance_load(load)]
        self._drains = [drain for drain in self._drains if not self._advance_drain(drain)]

    def deadlines(self) -> list[float]:
        return [drain.deadline for drain in self._drains if drain.deadline is not None]

    def _advance_load(self, load: LoadAdapter) -> bool:
        """Whether it has ended."""
        if (failure := self._adapters.failure(load.adapter)) is not None:
            self._tell(AdapterReply(load.reply_id, error=failure))
            return True
        if not self._adapters.is_ready(load.adapter):
            self._adapters.prefetch(load.adapter)
            return False
        try:
            if load.pin:
                self._adapters.pin(load.adapter)
        except Exception as error:
            self._tell(AdapterReply(load.reply_id, error=error))
            return True
        self._adapters.warm(load.adapter)
        self._tell(AdapterReply(load.reply_id, tier=self._adapters.tier(load.adapter)))
        return True

    def _advance_drain(self, drain: _Drain) -> bool:
        """Whether it has ended."""
        requests = list(self._requests_of(drain.name, drain.version))
        if requests and (drain.deadline is None or self._clock() < drain.deadline):
            return False
        for request in requests:
            self._cancel(request)
        self._adapters.end_drain(drain.name, drain.version, evict=True)
        for reply_id in drain.reply_ids:
            self._tell(AdapterReply(reply_id, cancelled=len(requests)))
        return True

    def _unload(self, command: UnloadAdapter) -> None:
        name, version = command.name, command.version
        for load in list(self._loads):
            if load.adapter.name == name and version in (None, load.adapter.version):
                self._loads.remove(load)
                self._tell(AdapterReply(load.reply_id, error=CalledOffError("unloaded before it was here")))
        deadline = None if command.timeout is None else self._clock() + command.timeout
        drain = next((drain for drain in self._drains if (drain.name, drain.version) == (name, version)), None)
        if drain is None:
            drain = _Drain(name, version, deadline)
            self._drains.append(drain)
            self._adapters.drain(name, version)
        elif deadline is not None:
            drain.deadline = deadline if drain.deadline is None else min(drain.deadline, deadline)
        drain.reply_ids.append(command.reply_id)

    def _call_off_drains(self, adapter: AdapterVersion) -> None:
        for drain in list(self._drains):
            if drain.name == adapter.name and drain.version in (None, adapter.version):
                self._drains.remove(drain)
                self._adapters.end_drain(drain.name, drain.version, evict=False)
                for reply_id in drain.reply_ids:
                    self._tell(AdapterReply(reply_id, error=CalledOffError("loaded again while it drained")))
