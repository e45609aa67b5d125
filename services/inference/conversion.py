"""Between the protos and what `Serving` speaks: requests in, events and stats out. Unset is never zero."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from multilora.common.v1 import common_pb2
from multilora.inference.v1 import control_pb2, inference_pb2
from services.common.errors import InvalidArgument, Unimplemented
from services.inference.engine.messages import ResidentAdapter
from services.inference.engine.request import AdapterVersion, SamplingParams
from services.inference.params import Stopping
from services.inference.serving import (
    Chunk,
    Event,
    Finished,
    GenerationRequest,
    PositionLogprobs,
    Started,
    TokenChoice,
)
from services.inference.tokenizer import ChatTurn

Prompt = str | Sequence[int] | Sequence[ChatTurn]


def to_generation_request(request: inference_pb2.GenerateRequest, timeout: float | None) -> GenerationRequest:
    """What a GenerateRequest asks for. Raises InvalidArgument and Unimplemented; ranges are checked by `Serving`.

    timeout: seconds until the call's deadline; None when it has none
    """
    if request.output.HasField("prompt_logprobs"):
        raise Unimplemented.not_yet("output.prompt_logprobs")
    return GenerationRequest(
        prompt=to_prompt(request),
        adapter=request.adapter,
        request_id=request.request_id,
        sampling=_to_sampling(request),
        stopping=_to_stopping(request.stopping),
        stream_interval=request.output.stream_interval if request.output.HasField("stream_interval") else 1,
        routing_key=request.routing_key,
        priority=request.priority,
        cache_salt=request.cache_salt,
        timeout=timeout,
    )


def to_prompt(request: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest) -> Prompt:
    """The prompt that is set. Raises InvalidArgument when none is."""
    match request.WhichOneof("prompt"):
        case "text":
            return request.text
        case "token_ids" if isinstance(request, inference_pb2.GenerateRequest):
            return list(request.token_ids.ids)
        case "messages":
            return [ChatTurn(message.role, message.content) for message in request.messages.messages]
        case _:
            raise InvalidArgument("EMPTY_PROMPT", "prompt is not set; send text, token_ids or messages", field="prompt")


def check_adapter_metadata(values: Sequence[str], adapter: str, *, field: str = "adapter") -> None:
    """Raise InvalidArgument when `x-multilora-adapter`, by which proxies route, differs from the body's adapter."""
    for value in values:
        if value != adapter:
            raise InvalidArgument(
                "ADAPTER_METADATA_MISMATCH",
                f"x-multilora-adapter is {value!r} but {field} is {adapter!r}; send the same in both, or no metadata",
                field=field,
            )


def _to_sampling(request: inference_pb2.GenerateRequest) -> SamplingParams:
    sampling = request.sampling
    if sampling.HasField("n") and sampling.n != 1:
        if sampling.n > 1:
            raise Unimplemented.not_yet("sampling.n above 1")
        raise InvalidArgument("INVALID_PARAMETER", "sampling.n is 0; it must be at least 1", field="sampling.n")
    default_temperature = 1.0 if request.HasField("sampling") else 0.0
    return SamplingParams(
        temperature=sampling.temperature if sampling.HasField("temperature") else default_temperature,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        seed=sampling.seed if sampling.HasField("seed") else secrets.randbits(64),
        logit_bias=dict(sampling.logit_bias),
        logprobs=request.output.logprobs if request.output.HasField("logprobs") else None,
    )


def _to_stopping(stopping: inference_pb2.StoppingParams) -> Stopping:
    return Stopping(
        max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else None,
        min_tokens=stopping.min_tokens,
        stop=tuple(stopping.stop),
        stop_token_ids=tuple(stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
        include_stop=stopping.include_stop,
    )


def from_event(event: Event) -> inference_pb2.GenerateResponse:
    """The event as it goes over the wire."""
    match event:
        case Started():
            return inference_pb2.GenerateResponse(started=_from_started(event))
        case Chunk():
            logprobs = [_from_position(position) for position in event.logprobs]
            chunk = inference_pb2.Chunk(text=event.text, token_ids=event.token_ids, logprobs=logprobs)
            return inference_pb2.GenerateResponse(chunk=chunk)
        case Finished():
            return inference_pb2.GenerateResponse(finished=_from_finished(event))


def _from_started(started: Started) -> inference_pb2.Started:
    adapter = started.adapter
    return inference_pb2.Started(
        request_id=started.request_id,
        adapter=adapter.name if adapter is not None else "",
        version=adapter.version if adapter is not None else 0,
        digest=adapter.digest if adapter is not None else "",
        tier=from_tier(started.tier),
        prompt_tokens=started.prompt_tokens,
        cached_tokens=started.cached_tokens,
    )


def _from_finished(finished: Finished) -> inference_pb2.Finished:
    return inference_pb2.Finished(
        reason=inference_pb2.FinishReason.Value(f"FINISH_REASON_{finished.reason}"),
        stop_match=finished.stop_match,
        usage=inference_pb2.Usage(
            prompt_tokens=finished.prompt_tokens,
            completion_tokens=finished.completion_tokens,
            cached_tokens=finished.cached_tokens,
        ),
        timings=inference_pb2.Timings(
            queue=finished.queue, adapter_load=finished.adapter_load, ttft=finished.ttft, total=finished.total
        ),
    )


def _from_position(position: PositionLogprobs) -> inference_pb2.PositionLogprobs:
    return inference_pb2.PositionLogprobs(
        chosen=_from_choice(position.chosen), top=[_from_choice(choice) for choice in position.top]
    )


def _from_choice(choice: TokenChoice) -> inference_pb2.TokenLogprob:
    return inference_pb2.TokenLogprob(token_id=choice.token_id, logprob=choice.logprob, token=choice.token)


def from_resident(resident: ResidentAdapter, base_model: str) -> control_pb2.ResidentAdapter:
    """An adapter of this replica as the control service tells of it."""
    return control_pb2.ResidentAdapter(
        identity=from_version(resident.adapter, base_model),
        tier=from_tier(resident.tier),
        slot=resident.slot if resident.slot is not None else 0,
        pages=resident.pages,
        references=resident.references,
        requests=resident.requests,
        rank=resident.rank,
        cpu_bytes=resident.cpu_bytes,
        error=resident.error,
        waiting=resident.waiting,
        pinned=resident.pinned,
        state=resident.state,
    )


def from_version(version: AdapterVersion, base_model: str) -> common_pb2.AdapterIdentity:
    return common_pb2.AdapterIdentity(
        adapter=version.name,
        version=version.version,
        digest=version.digest,
        pack_digest=version.pack_digest,
        pack_size=version.pack_size,
        base_model=base_model,
    )


def from_tier(tier: str) -> common_pb2.Tier.ValueType:
    """'' is the base model, which is in no tier."""
    return common_pb2.Tier.Value(f"TIER_{tier}") if tier else common_pb2.TIER_UNSPECIFIED
