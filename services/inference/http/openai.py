"""OpenAI's two generation requests, with the extension fields vLLM's clients send, as a `GenerationRequest`."""

from __future__ import annotations

import secrets
import uuid
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.common.errors import InvalidArgument
from services.inference.engine.request import SamplingParams
from services.inference.http.fields import check_fields
from services.inference.params import Stopping
from services.inference.serving import GenerationRequest
from services.inference.tokenizer import ChatTurn

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of max_tokens for completions. A chat answer's default is what is left of the model's length."""

Integer = Annotated[int, Field(ge=-(2**63), lt=2**64)]


class StreamOptions(BaseModel):
    """include_obfuscation pads OpenAI's own streams; nothing is padded here."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


class OpenAIRequest(BaseModel):
    """What both requests have. Types are checked here, ranges by `Serving`, as for every face.

    priority: as vLLM's, lower is sooner; the native face counts the other way round
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: Integer = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: Integer | None = None
    logit_bias: dict[str, float] = Field(default_factory=dict)

    max_tokens: Integer | None = None
    min_tokens: Integer = 0
    stop: str | list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    priority: Integer = 0
    cache_salt: str = ""
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False

    @classmethod
    def parse(cls, body: dict[str, Any]) -> Self:
        """Raises InvalidArgument naming the field that is unknown, not served yet or of the wrong type."""
        try:
            return cls.model_validate(check_fields(body, frozenset(cls.model_fields)))
        except ValidationError as error:
            # A union's members each complain; whoever got furthest into the value says most.
            deepest = max(error.errors(include_url=False, include_context=False), key=lambda each: len(each["loc"]))
            name = _path(deepest["loc"])
            raise InvalidArgument("INVALID_FIELD", f"{name}: {deepest['msg']}", field=name) from error

    @abstractmethod
    def generation(self) -> GenerationRequest:
        """The same, as `Serving` takes it."""

    def _generation(
        self, prompt: str | Sequence[int] | Sequence[ChatTurn], max_tokens: int | None, logprobs: int | None, kind: str
    ) -> GenerationRequest:
        return GenerationRequest(
            prompt=prompt,
            adapter=self.model,
            request_id=f"{kind}-{uuid.uuid4().hex}",
            priority=-self.priority,
            cache_salt=self.cache_salt,
            sampling=SamplingParams(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=0 if self.top_k == -1 else self.top_k,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                frequency_penalty=self.frequency_penalty,
                presence_penalty=self.presence_penalty,
                seed=self._seed(),
                logit_bias={_token_id(token): bias for token, bias in self.logit_bias.items()},
                logprobs=logprobs,
            ),
            stopping=Stopping(
                max_tokens=max_tokens,
                min_tokens=self.min_tokens,
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
                stop_token_ids=tuple(self.stop_token_ids),
                ignore_eos=self.ignore_eos,
                include_stop=self.include_stop_str_in_output,
            ),
        )

    def _seed(self) -> int:
        """OpenAI's seeds are signed; those below zero take the upper half of ours."""
        if self.seed is None:
            return secrets.randbits(64)
        return self.seed + 2**64 if -(2**63) <= self.seed < 0 else self.seed


class CompletionRequest(OpenAIRequest):
    """POST /v1/completions. logprobs: alternatives per token; 0 gives the chosen one's alone."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Integer | None = None

    def generation(self) -> GenerationRequest:
        max_tokens = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        return self._generation(self._prompt(), max_tokens, self.logprobs, "cmpl")

    def _prompt(self) -> str | list[int]:
        prompts = self.prompt
        if isinstance(prompts, str):
            return prompts
        single = [prompt for prompt in prompts if not isinstance(prompt, int)]
        if len(single) > 1:
            raise InvalidArgument(
                "NOT_SERVED_YET", "prompt: several prompts in one call are not served yet; send one", field="prompt"
            )
        return single[0] if single else [token for token in prompts if isinstance(token, int)]


class TextPart(BaseModel):
    """A piece of a message's content; text is the only kind served."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn. Other fields are what clients send back of an answer; they are refused when they say something."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str | list[TextPart]
    name: str | None = None

    def turn(self, field: str) -> ChatTurn:
        for name, value in (self.model_extra or {}).items():
            if value:
                raise InvalidArgument(
                    "NOT_SERVED_YET", f"{field}.{name} is not served; leave it out", field=f"{field}.{name}"
                )
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return ChatTurn(self.role, text)


class ChatRequest(OpenAIRequest):
    """POST /v1/chat/completions. top_logprobs: alternatives per token, with logprobs only."""

    messages: list[Message]
    max_completion_tokens: Integer | None = None
    logprobs: bool = False
    top_logprobs: Integer | None = None

    def generation(self) -> GenerationRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidArgument("INVALID_FIELD", "top_logprobs needs logprobs; set it to true", field="top_logprobs")
        turns = [message.turn(f"messages[{index}]") for index, message in enumerate(self.messages)]
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._generation(turns, max_tokens, logprobs, "chatcmpl")


def _token_id(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise InvalidArgument("INVALID_FIELD", f"logit_bias: {text!r} is no token id", field="logit_bias") from error


def _path(location: Sequence[str | int]) -> str:
    """`messages[0].content`; what pydantic adds for the members of a union is left out."""
    path = str(location[0])
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int"):
            path += f".{part}"
    return path
