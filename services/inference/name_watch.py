"""Follows the store's Watch: keeps the name snapshot true, fetches what was promoted, drops what was deleted."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from services.common.errors import MultiloraError
from services.common.references import LATEST
from services.inference.engine.request import AdapterVersion
from services.inference.resolver import Resolver

FIRST_RETRY, LAST_RETRY = 0.1, 5.0
"""Seconds before a broken watch is taken up again; doubled each time, with half of it left to chance."""

log = logging.getLogger(__name__)


class News(Enum):
    """What a message of the watch says."""

    RESET = auto()
    HEARTBEAT = auto()
    CHANGED = auto()
    DELETED = auto()
    BASE_MODEL = auto()


@dataclass(frozen=True, slots=True)
class Message:
    """One message of the watch. revision, epoch: where to go on after a break; the rest as the news has it."""

    news: News
    revision: int
    epoch: str
    adapter: str = ""
    version: int = 0
    alias: str = ""
    base_model: str = ""


class Watchable(Protocol):
    """Where the messages come from."""

    def watch(self, after_revision: int, epoch: str) -> AsyncGenerator[Message, None]: ...


class NameWatch:
    """prefetch, drop: called with a version that is wanted soon, and with the name and number of one that is deleted

    base_changed: called when the served base model's profile was registered or widened
    """

    def __init__(
        self,
        source: Watchable,
        resolver: Resolver,
        *,
        base_model: str,
        prefetch: Callable[[AdapterVersion], None],
        drop: Callable[[str, int], None],
        base_changed: Callable[[], None],
    ) -> None:
        self._source = source
        self._resolver = resolver
        self._base_model = base_model
        self._prefetch = prefetch
        self._drop = drop
        self._base_changed = base_changed
        self._revision, self._epoch = 0, ""

    async def run(self) -> None:
        """Watch until cancelled; a watch that breaks is taken up where it broke."""
        retry = FIRST_RETRY
        while True:
            try:
                async for message in self._source.watch(self._revision, self._epoch):
                    retry = FIRST_RETRY
                    await self._take(message)
            except MultiloraError as error:
                log.warning("the watch of names broke: %s", error)
            await asyncio.sleep(retry * random.uniform(0.5, 1.0))
            retry = min(2 * retry, LAST_RETRY)

    async def _take(self, message: Message) -> None:
        self._revision, self._epoch = message.revision, message.epoch
        match message.news:
            case News.RESET:
                self._resolver.reset()
                self._base_changed()
            case News.BASE_MODEL if message.base_model == self._base_model:
                self._base_changed()
            case News.DELETED:
                self._resolver.changed(message.adapter)
                self._drop(message.adapter, message.version)
            case News.CHANGED:
                await self._refresh(message)
        self._resolver.seen()

    async def _refresh(self, message: Message) -> None:
        """Ask again for what was known of the adapter; what a moved alias means now, requests will want soon."""
        for full in self._resolver.changed(message.adapter):
            if full not in (f"{message.adapter}:{message.alias}", f"{message.adapter}:{LATEST}"):
                continue
            try:
                meaning = await self._resolver.ask(full)
            except MultiloraError as error:
                log.info("%s: %s", full, error)
                continue
            for version in meaning.versions.values():
                self._prefetch(version)
