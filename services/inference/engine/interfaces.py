"""What the engine is handed: a runner and the adapters. It imports neither."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from services.inference.engine.messages import ResidentAdapter, TokenLogprobs
from services.inference.engine.request import AdapterVersion, Request


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """A request's share of a step: its next `num_tokens` uncomputed tokens.

    slot: where its adapter lies in the pool, held for this step; None for the base model
    """

    request: Request
    num_tokens: int
    slot: int | None = None

    @property
    def samples(self) -> bool:
        """Whether the step reaches the request's last token, and so brings its next one."""
        return self.num_tokens == self.request.num_uncomputed_tokens


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The next token of a request; or, with `error`, why it cannot have one.

    late: chosen only when it was read; a step launched before that went on from another token
    """

    token_id: int = 0
    logprobs: TokenLogprobs | None = None
    error: Exception | None = None
    late: bool = False


class LaunchedStep(Protocol):
    """A step on its way.

    runs_ahead: whether the next step may be launched before this one is read. Not so where the host has to choose a
    token of it, as it does for penalties, biases, logprobs and until min_tokens: that one waits for `read`.
    """

    @property
    def runs_ahead(self) -> bool: ...

    def read(self) -> list[SampledToken | None]:
        """Wait for it; an entry per request, None for one that does not sample in it."""


@dataclass(frozen=True, slots=True)
class StepDone:
    """A step that was computed as it was launched."""

    tokens: list[SampledToken | None]

    @property
    def runs_ahead(self) -> bool:
        return False

    def read(self) -> list[SampledToken | None]:
        return self.tokens


class Runner(Protocol):
    """Runs the model, a step after the other."""

    def launch(self, step: Sequence[ScheduledRequest]) -> LaunchedStep:
        """Begin one step, which comes after all that was launched before. A request's last token may be `PENDING`,
        from the step before, if that one runs ahead. What the requests say is read before this returns."""


class Lack(Enum):
    """What an adapter lacks for a slot: room, which others hold, or itself, as its copy failed or is under way."""

    ROOM = auto()
    ADAPTER = auto()


class Slots(Protocol):
    """The part of `Adapters` that the scheduler asks: places in the pool, each held for a step."""

    def tier(self, adapter: AdapterVersion) -> str:
        """STORE, DISK, CPU or GPU."""

    def acquire(self, adapter: AdapterVersion, *, follows: bool = False) -> int | Lack:
        """The slot of a ready adapter, loaded and held; or why there is none now.

        follows: whether the step has a prompt of the adapter's to compute, and so may go from layer to layer behind its
            copy. Whoever comes later finds the copy done.
        """

    def release(self, adapter: AdapterVersion) -> None: ...


class Adapters(Slots, Protocol):
    """Adapters on this replica. Called by the engine's thread only; nothing here waits.

    A *claim* keeps an adapter's copy in host memory for a request's life; a *slot* is its place in the pool, held for
    a step.
    """

    def prefetch(self, adapter: AdapterVersion) -> None:
        """Fetch it to host memory, unless claims of others leave no room."""

    def drop(self, name: str, version: int) -> None:
        """Let go of a version that was deleted, wherever no request holds it."""

    def try_claim(self, adapter: AdapterVersion) -> bool:
        """Claim room in host memory, fetching the adapter if it is not there; False when others have all the room."""

    def unclaim(self, adapter: AdapterVersion) -> None: ...

    def is_ready(self, adapter: AdapterVersion) -> bool:
        """Whether a claimed adapter is in host memory."""

    def failure(self, adapter: AdapterVersion) -> Exception | None:
        """Why the adapter cannot be had, for as long as it is left alone; None when it may be tried."""

    def warm(self, adapter: AdapterVersion) -> None:
        """Load a ready adapter, if a slot and its pages are free."""

    def pin(self, adapter: AdapterVersion) -> None:
        """Keep it resident as far as possible. Raises ResourceExhausted when every slot is pinned."""

    def unpin(self, adapter: AdapterVersion) -> None: ...

    def drain(self, name: str, version: int | None) -> None:
        """A version, or with None every one, is used by those who have it and then given up."""

    def end_drain(self, name: str, version: int | None, *, evict: bool) -> None:
        """With `evict` give it up, wherever no request of another name holds it; else keep it after all."""

    def poll(self) -> None:
        """Take in what fetches have ended, and do what is due."""

    def next_deadline(self) -> float | None:
        """Seconds until `poll` has something to do; None when only a fetch's end can bring that."""

    def list(self, waiting: Mapping[str, int]) -> list[ResidentAdapter]:
        """Every adapter asked for, the last one first; `waiting` counts waiting requests by digest."""

    @property
    def transitions(self) -> Mapping[tuple[str, str], int]:
        """How often each arrow of an adapter's states was taken."""

    @property
    def evictions(self) -> int: ...

    @property
    def loads(self) -> int: ...

    def close(self) -> None:
        """End what is under way elsewhere; nothing is asked of it any more."""

    def check_integrity(self) -> None: ...
