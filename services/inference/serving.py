"""The serving face: what the gRPC and HTTP handlers delegate to.

A `GenerationRequest`, whoever sent it, is checked here and becomes a stream of events: Started, Chunk …, Finished.
Whatever goes wrong is raised as one of `services.common.errors`.
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field

from services.common.auth.callers import caller
from services.common.errors import (
    AlreadyExists,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    MultiloraError,
    ResourceExhausted,
)
from services.inference.async_engine import AsyncEngine
from services.inference.config import ServerConfig
from services.inference.detokenizer import Detokenizer
from services.inference.engine.engine import DeadlinePassedError, QueueFullError
from services.inference.engine.messages import (
    AddRequest,
    RequestFinished,
    RequestOutput,
    RequestStarted,
    RequestTimes,
    TokenLogprobs,
)
from services.inference.engine.request import AdapterVersion, SamplingParams
from services.inference.model.config import ModelConfig
from services.inference.params import Stopping, check_priority, check_sampling, check_stopping
from services.inference.resolver import Resolver
from services.inference.tokenizer import ChatTurn, Tokenizer
from services.inference.traffic import Meter, Traffic

log = logging.getLogger(__name__)

MAX_REQUEST_ID = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What a caller asks for.

    prompt: text, token ids, or the turns of a conversation
    adapter: adapter reference; empty is the base model
    request_id: made up when empty
    priority: higher is sooner, among requests for the same adapter
    cache_salt: only requests with the same one share what is computed of a common beginning
    stream_interval: tokens gathered into one chunk
    timeout: seconds until the caller's deadline; None waits for ever
    """

    prompt: str | Sequence[int] | Sequence[ChatTurn]
    adapter: str = ""
    request_id: str = ""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stopping: Stopping = field(default_factory=Stopping)
    stream_interval: int = 1
    routing_key: str = ""
    priority: int = 0
    cache_salt: str = ""
    timeout: float | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """What a request was bound to. adapter: None is the base model; tier: '' then, else STORE, DISK, CPU or GPU."""

    request_id: str
    adapter: AdapterVersion | None
    tier: str
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """A token, its text and its log-probability."""

    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The chosen token at one position, and the likeliest ones, likeliest first."""

    chosen: TokenChoice
    top: tuple[TokenChoice, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens, and the text that became certain with them."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """Why it ended (STOP, LENGTH or CANCELLED), on which stop text, what it used and where the time went (seconds)."""

    reason: str
    stop_match: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue: float
    adapter_load: float
    ttft: float
    total: float


Event = Started | Chunk | Finished


class Serving:
    """Generation, tokenizing and what there is to know about the served model."""

    def __init__(
        self, config: ServerConfig, model: ModelConfig, tokenizer: Tokenizer, resolver: Resolver, engine: AsyncEngine
    ) -> None:
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.resolver = resolver
        self.engine = engine
        self.traffic = Traffic(config.metrics_top_adapters)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Generate. Closing the iterator stops the request at the engine's next step."""
        adapter = await self.resolver.resolve(request.adapter, request.routing_key)
        add = self._admit(request, adapter)
        detokenizer = Detokenizer(self.tokenizer, request.stopping)
        pending = _PendingChunk(request.stream_interval)
        cached_tokens, times = 0, RequestTimes()
        arrival = time.monotonic()
        with self._metered(adapter) as meter:
            async with contextlib.aclosing(self.engine.generate(add)) as outputs:
                async for output in outputs:
                    if isinstance(output, RequestStarted):
                        cached_tokens = output.cached_tokens
                        meter.started(output.tier, len(add.prompt_token_ids))
                        shown_id = request.request_id or add.request_id
                        yield Started(shown_id, adapter, output.tier, len(add.prompt_token_ids), cached_tokens)
                        continue
                    times = output.times or times
                    stop_token_id = output.finished.stop_token_id if output.finished is not None else None
                    text, used = detokenizer.push(output.token_ids, stop_token_id)
                    meter.tokens(used, output.times)
                    if output.finished is not None:
                        text += detokenizer.flush()
                    pending.add(text, output.token_ids[:used], self._logprobs(output, used))
                    finished = RequestFinished("STOP") if detokenizer.stop_match else output.finished
                    if finished is None:
                        if pending.full:
                            yield pending.take()
                        continue
                    if finished.error is not None:
                        raise _as_typed(finished.error)
                    if not pending.empty:
                        yield pending.take()
                    yield self._finished(add, detokenizer, finished, cached_tokens, times, time.monotonic() - arrival)
                    return

    @contextlib.contextmanager
    def _metered(self, adapter: AdapterVersion | None) -> Iterator[Meter]:
        """What the request brings counts, however it ends: in the metrics, and against its tenant's limit."""
        meter, budget = Meter(), caller().budget
        try:
            yield meter
        except MultiloraError as error:
            meter.failed(error.code)
            raise
        finally:
            self.traffic.add(adapter.name if adapter is not None else self.model.name, meter.record)
            if budget is not None:
                budget.spend(meter.record.prompt_tokens + meter.record.generation_tokens)

    def prompt_ids(self, prompt: str | Sequence[int] | Sequence[ChatTurn], *, field: str = "prompt") -> list[int]:
        """The token ids of a prompt. Raises InvalidArgument when it is empty or out of the vocabulary."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        elif prompt and isinstance(prompt[0], ChatTurn):
            ids = self.tokenizer.encode_chat([turn for turn in prompt if isinstance(turn, ChatTurn)])
        else:
            ids = [token for token in prompt if isinstance(token, int)]
            if bad := [token for token in ids if not 0 <= token < self.model.vocab_size]:
                raise InvalidArgument(
                    "TOKEN_OUT_OF_RANGE",
                    f"{field}: token id {bad[0]} is outside the vocabulary of {self.model.vocab_size}",
                    field=field,
                )
        if not ids:
            raise InvalidArgument("EMPTY_PROMPT", f"{field} is empty; send at least one token", field=field)
        return ids

    def _admit(self, request: GenerationRequest, adapter: AdapterVersion | None) -> AddRequest:
        if len(request.request_id) > MAX_REQUEST_ID:
            raise InvalidArgument(
                "INVALID_REQUEST_ID", f"request_id is longer than {MAX_REQUEST_ID} characters", field="request_id"
            )
        request_id = caller().salted(request.request_id) if request.request_id else f"req-{uuid.uuid4().hex}"
        if self.engine.in_flight(request_id):
            raise AlreadyExists(
                "REQUEST_ID_IN_USE",
                f"request_id {request.request_id!r} is in flight; send another, or leave it empty",
                field="request_id",
            )
        if request.stream_interval < 1:
            raise InvalidArgument(
                "INVALID_STREAM_INTERVAL", "output.stream_interval must be at least 1", field="output.stream_interval"
            )
        ids = self.prompt_ids(request.prompt)
        room = self.model.max_model_len - len(ids)
        if room < 1:
            raise InvalidArgument(
                "PROMPT_TOO_LONG",
                f"prompt has {len(ids)} tokens; with one token of answer at most {self.model.max_model_len} fit: "
                "shorten it",
                field="prompt",
                prompt_tokens=len(ids),
                max_model_len=self.model.max_model_len,
            )
        sampling = check_sampling(request.sampling, self.model.vocab_size)
        eos = frozenset() if request.stopping.ignore_eos else self.tokenizer.eos_token_ids
        stopping = check_stopping(request.stopping, room, eos, self.model.vocab_size)
        return AddRequest(
            request_id,
            ids,
            sampling,
            stopping,
            adapter,
            request.timeout,
            check_priority(request.priority),
            caller().salted(request.cache_salt),
        )

    def _finished(
        self,
        add: AddRequest,
        detokenizer: Detokenizer,
        finished: RequestFinished,
        cached_tokens: int,
        times: RequestTimes,
        total: float,
    ) -> Finished:
        stop_match = detokenizer.stop_match
        if not stop_match and finished.stop_token_id is not None:
            stop_match = self.tokenizer.token_text(finished.stop_token_id)
        return Finished(
            reason=finished.reason,
            stop_match=stop_match,
            prompt_tokens=len(add.prompt_token_ids),
            completion_tokens=detokenizer.num_tokens,
            cached_tokens=cached_tokens,
            queue=times.queue,
            adapter_load=times.adapter_load,
            ttft=times.ttft,
            total=total,
        )

    def _logprobs(self, output: RequestOutput, used: int) -> tuple[PositionLogprobs, ...]:
        def position(token_id: int, logprobs: TokenLogprobs) -> PositionLogprobs:
            top = zip(logprobs.top_ids, logprobs.top, strict=True)
            return PositionLogprobs(
                self._choice(token_id, logprobs.chosen), tuple(self._choice(token, value) for token, value in top)
            )

        pairs = zip(output.token_ids, output.logprobs, strict=False)
        return tuple(position(token, logprobs) for token, logprobs in list(pairs)[:used])

    def _choice(self, token_id: int, logprob: float) -> TokenChoice:
        return TokenChoice(token_id, self.tokenizer.token_text(token_id), logprob)


def _as_typed(error: Exception) -> MultiloraError:
    if isinstance(error, MultiloraError):
        return error
    if isinstance(error, QueueFullError):
        return ResourceExhausted("QUEUE_FULL", str(error), retry_after=error.retry_after, waiting=error.waiting)
    if isinstance(error, DeadlinePassedError):
        return DeadlineExceeded("DEADLINE_EXCEEDED", "the deadline passed before the answer was complete")
    log.error("a request failed", exc_info=error)
    return Internal("INTERNAL", "the server failed; its log says more")


class _PendingChunk:
    """Gathers tokens until a chunk's worth is there."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._clear()

    def _clear(self) -> None:
        self._text: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[PositionLogprobs] = []

    def add(self, text: str, ids: Sequence[int], logprobs: Sequence[PositionLogprobs]) -> None:
        self._text.append(text)
        self._ids.extend(ids)
        self._logprobs.extend(logprobs)

    @property
    def full(self) -> bool:
        return len(self._ids) >= self._interval

    @property
    def empty(self) -> bool:
        return not self._ids and not any(self._text)

    def take(self) -> Chunk:
        chunk = Chunk("".join(self._text), tuple(self._ids), tuple(self._logprobs))
        self._clear()
        return chunk
