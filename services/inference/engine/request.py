"""A request inside the engine, and the one function that moves it between states.

                                                                    ┌── turn, seat ──▸ PARKED ──┐ another's turn:
                                                                    │                           │ blocks kept
WAITING_FOR_ADAPTER ──adapter in memory──▸ WAITING ──blocks──▸ RUNNING ◂────────────────────────┘
                                                                 ▲  │ └──▸ FINISHED_*
                                                                 │  ▼
                                            computed again ── PREEMPTED (or from PARKED): KV cache full, blocks lost
from PARKED and PREEMPTED to FINISHED_* as well, by a token that was on its way; and from anywhere to FINISHED_CANCELLED
and FINISHED_ERROR
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

DEFAULT_TENANT = "default"

PENDING = -1
"""In the place of a token that a launched step will bring."""

PRIORITY_SECONDS = 1.0
"""What a step of priority is worth: as if the request had come so much earlier. So it orders, and starves nobody."""

log = logging.getLogger(__name__)


class RequestStatus(IntEnum):
    """Ordered: everything above PREEMPTED has ended."""

    WAITING_FOR_ADAPTER = 0
    WAITING = 1
    RUNNING = 2
    PARKED = 3
    PREEMPTED = 4
    FINISHED_STOPPED = 5
    FINISHED_LENGTH = 6
    FINISHED_CANCELLED = 7
    FINISHED_ERROR = 8

    @property
    def finished(self) -> bool:
        return self > RequestStatus.PREEMPTED


_ANSWERED = {RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH}
_ENDS = {RequestStatus.FINISHED_CANCELLED, RequestStatus.FINISHED_ERROR}
_ALLOWED: Mapping[RequestStatus, set[RequestStatus]] = {
    RequestStatus.WAITING_FOR_ADAPTER: {RequestStatus.WAITING, *_ENDS},
    RequestStatus.WAITING: {RequestStatus.RUNNING, *_ENDS},
    RequestStatus.RUNNING: {RequestStatus.PARKED, RequestStatus.PREEMPTED, *_ANSWERED, *_ENDS},
    RequestStatus.PARKED: {RequestStatus.RUNNING, RequestStatus.PREEMPTED, *_ANSWERED, *_ENDS},
    RequestStatus.PREEMPTED: {RequestStatus.RUNNING, *_ANSWERED, *_ENDS},
}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a token is chosen; the defaults are greedy. Ranges are checked where requests come in."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class StoppingParams:
    """When an answer ends, as far as token ids tell. Stop texts are the detokenizer's to see."""

    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """The version a request is bound to for its whole life. `digest` is its identity; the names are for people."""

    name: str
    version: int
    digest: str
    pack_digest: str
    pack_size: int


@dataclass(eq=False, slots=True)
class Request:
    """One sequence being generated.

    sequence: place in the order of arrival, given by `RequestQueues`
    priority: each step up counts as having come `PRIORITY_SECONDS` earlier
    cache_salt: only requests with the same one share cached prefixes
    token_ids: prompt and output; the first `num_computed_tokens` have their keys and values in the blocks, or will have
        by the time a step launched later looks there. What a launched step has yet to bring is `PENDING`
    num_cached_tokens: of the prompt, what another request had computed
    prefixes, num_remembered_blocks: see `KVCacheManager`
    waiting_steps: steps since it could have run but for blocks
    arrival_tier: where its adapter was when it came; '' for the base model
    claimed: whether it keeps its adapter in host memory
    deadline, the times: seconds of the engine's clock
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    stopping: StoppingParams
    adapter: AdapterVersion | None = None
    deadline: float | None = None
    arrival_time: float = 0.0
    priority: int = 0
    cache_salt: str = ""
    sequence: int = 0

    status: RequestStatus = RequestStatus.WAITING_FOR_ADAPTER
    token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    prefixes: list[bytes] = field(default_factory=list)
    num_remembered_blocks: int = 0
    waiting_steps: int = 0
    arrival_tier: str = ""
    claimed: bool = False
    adapter_ready_time: float = 0.0
    first_scheduled_time: float | None = None
    first_token_time: float | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)

    @property
    def rank(self) -> tuple[float, int]:
        """Who comes first among the requests for one adapter, and keeps its blocks longest among all: lower does. It
        grows with the clock, so nobody starves, and no two are equal, so that there is always a first one."""
        return self.arrival_time - self.priority * PRIORITY_SECONDS, self.sequence

    @property
    def flow(self) -> str:
        """What it queues for: its adapter's digest, or '' for the base model."""
        return self.adapter.digest if self.adapter is not None else ""

    @property
    def tenant(self) -> str:
        """Whose adapter it asks for; the base model is everybody's, and counts as the default tenant's."""
        return self.adapter.name.partition("/")[0] if self.adapter is not None else DEFAULT_TENANT

    @property
    def is_admitted(self) -> bool:
        """Whether it has blocks."""
        return self.status in (RequestStatus.RUNNING, RequestStatus.PARKED)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[len(self.prompt_token_ids) :]

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_ending(self) -> bool:
        """Whether its last token is there or on its way: no step takes it in any more."""
        return self.num_output_tokens >= self.stopping.max_tokens

    def advance(self, num_tokens: int) -> None:
        """A step is launched that computes so many more of its tokens, and after the last one brings the next."""
        self.num_computed_tokens += num_tokens
        if not self.num_uncomputed_tokens:
            self.token_ids.append(PENDING)

    def set_status(self, status: RequestStatus) -> None:
        """Move to `status`; a move that is not drawn above is a bug and raises."""
        if status not in _ALLOWED.get(self.status, set()):
            raise AssertionError(f"request {self.request_id}: {self.status.name} → {status.name} is not allowed")
        log.debug("request %s: %s → %s", self.request_id, self.status.name, status.name)
        self.status = status
