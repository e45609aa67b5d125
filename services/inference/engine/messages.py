"""What the serving face and the engine say to each other: picklable, so that either may move to its own process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from services.inference.engine.request import AdapterVersion, SamplingParams, StoppingParams

# ---- face → engine


@dataclass(frozen=True, slots=True)
class AddRequest:
    """Generate. timeout: seconds from now until the caller's deadline, if it has one; priority: higher is sooner;
    cache_salt: only requests with the same one share what is computed of a common beginning."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    stopping: StoppingParams
    adapter: AdapterVersion | None = None
    timeout: float | None = None
    priority: int = 0
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class AbortRequest:
    """Stop a request whose answer nobody waits for any more. Unknown ids are ignored: it may just have ended."""

    request_id: str


@dataclass(frozen=True, slots=True)
class GetStats:
    """Ask for an `EngineStats`, answered between two steps."""

    reply_id: int


@dataclass(frozen=True, slots=True)
class AdaptersChanged:
    """Wake up: a fetch has ended. Sent by the adapter manager's workers."""


@dataclass(frozen=True, slots=True)
class RankDied:
    """A process that computes a part of the model has ended, and so must the engine. Sent by whoever watches it."""

    reason: str


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Bring a version to host memory, if there is room that nobody claims: requests will want it soon."""

    adapter: AdapterVersion


@dataclass(frozen=True, slots=True)
class DropVersion:
    """Let go of a deleted version wherever no request holds it."""

    name: str
    version: int


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Bring a version here and, with `pin`, keep it. Answered by an `AdapterReply` once it is here, or has failed."""

    reply_id: int
    adapter: AdapterVersion
    pin: bool = False


@dataclass(frozen=True, slots=True)
class UnpinAdapter:
    """Let a pinned version be evicted again; answered by an `AdapterReply`."""

    reply_id: int
    adapter: AdapterVersion


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    """Let the running requests of an adapter finish, then evict it; answered by an `AdapterReply`.

    version: None unloads every version
    timeout: seconds until its requests are cancelled; None waits for all of them
    """

    reply_id: int
    name: str
    version: int | None
    timeout: float | None


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End the loop. With `drain`, first finish every request the engine has."""

    drain: bool


AdapterCommand = LoadAdapter | UnpinAdapter | UnloadAdapter
EngineInput = (
    AddRequest
    | AbortRequest
    | GetStats
    | AdaptersChanged
    | RankDied
    | Prefetch
    | DropVersion
    | AdapterCommand
    | Shutdown
)

# ---- engine → face


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position: of the chosen token, and of the likeliest ones, likeliest first."""

    chosen: float
    top_ids: tuple[int, ...] = ()
    top: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestStarted:
    """The first word about a request, as its first step begins. `tier` is where its adapter was when it came: STORE,
    DISK, CPU or GPU; '' for the base model."""

    request_id: str
    tier: str
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """Seconds from a request's arrival to its first step (queue), to its adapter in memory (adapter_load, 0 when it
    was there) and to its first token (ttft)."""

    queue: float = 0.0
    adapter_load: float = 0.0
    ttft: float = 0.0


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """The last word about a request, beside its last tokens.

    reason: STOP, LENGTH, CANCELLED or ERROR; with ERROR, `error` says what to raise
    stop_token_id: the id that ended it, when one did
    """

    reason: str
    stop_token_id: int | None = None
    error: Exception | None = None


class RequestOutput(NamedTuple):
    """What a step brought a request, or several steps did. `times` comes with the first token.

    A tuple, as there is one for each token: pickled there and back in a tenth of the time.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    times: RequestTimes | None = None
    finished: RequestFinished | None = None


@dataclass(frozen=True, slots=True)
class ResidentAdapter:
    """An adapter as the engine sees it. tier: STORE, DISK, CPU or GPU; slot: None unless GPU.

    state: the name of its `AdapterState`
    """

    adapter: AdapterVersion
    tier: str
    slot: int | None
    pages: int
    references: int
    waiting: int
    requests: int
    rank: int
    cpu_bytes: int
    error: str
    state: str
    pinned: bool


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine's truth at one moment. Counters count from the start.

    running, parked: requests with KV blocks that take part in steps, and whose adapter's turn it is not
    waiting: requests without blocks; refused: those that found the queue full
    prefix_queried_tokens, prefix_hit_tokens: prompt tokens looked for in the prefix cache, and found
    requests_by_adapter: requests that run, are parked or wait, by the digest of their adapter
    adapter_transitions: how often adapters went from one `AdapterState` to another, by their names
    """

    running: int
    parked: int
    waiting: int
    refused: int
    blocks: int
    blocks_free: int
    block_size: int
    steps: int
    preemptions: int
    parkings: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    slot_evictions: int
    adapter_loads: int
    max_adapters_in_step: int
    prompt_tokens: int
    generation_tokens: int
    adapters: tuple[ResidentAdapter, ...]
    requests_by_adapter: Mapping[str, int]
    adapter_transitions: Mapping[tuple[str, str], int]


@dataclass(frozen=True, slots=True)
class StatsReply:
    reply_id: int
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class AdapterReply:
    """How an adapter command ended. tier: where a loaded adapter is; cancelled: requests that an unload cut off."""

    reply_id: int
    tier: str = ""
    cancelled: int = 0
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class EngineDied:
    """The engine ended by a fault of its own; every request it had is lost."""

    error: str


EngineOutput = RequestStarted | RequestOutput | StatsReply | AdapterReply | EngineDied
