"""What OpenAI's clients get back: an answer's text, logprobs and usage, whole or in pieces.

Beside OpenAI's fields, an answer and the first piece of a stream carry `multilora`: what the request was bound to.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from services.common.errors import Unavailable
from services.inference.serving import Chunk, Finished, PositionLogprobs, Started, TokenChoice

Json = dict[str, Any]

FINISH_REASONS = {"STOP": "stop", "LENGTH": "length"}


class AnswerFormat(ABC):
    """Builds the bodies of one answer.

    model: as the caller named it
    """

    whole_object: str
    piece_object: str

    def __init__(self, model: str, started: Started) -> None:
        self._head: Json = {"id": started.request_id, "created": int(time.time()), "model": model}
        self._multilora = _binding(started)
        self._offset = 0

    def whole(self, chunks: Sequence[Chunk], finished: Finished) -> Json:
        """The body of an answer that is not streamed. Raises Unavailable when the server cancelled it."""
        text = "".join(chunk.text for chunk in chunks)
        positions = [position for chunk in chunks for position in chunk.logprobs]
        choice = self._whole_choice(text) | self._choice(positions, finished)
        body = self._head | {"object": self.whole_object, "choices": [choice], "usage": usage(finished)}
        return body | {"multilora": self._multilora}

    def first(self) -> Json | None:
        """The piece sent before any text; None when the format has none."""
        return None

    def piece(self, chunk: Chunk) -> Json:
        return self._piece(self._piece_choice(chunk.text) | self._choice(chunk.logprobs, None))

    def last(self, finished: Finished) -> Json:
        """Raises Unavailable when the server cancelled the answer."""
        return self._piece(self._piece_choice(None) | self._choice((), finished))

    def usage_piece(self, finished: Finished) -> Json:
        return self._head | {"object": self.piece_object, "choices": [], "usage": usage(finished)}

    @abstractmethod
    def _whole_choice(self, text: str) -> Json: ...

    @abstractmethod
    def _piece_choice(self, text: str | None) -> Json: ...

    @abstractmethod
    def _logprobs(self, positions: Sequence[PositionLogprobs]) -> Json: ...

    def _choice(self, positions: Sequence[PositionLogprobs], finished: Finished | None) -> Json:
        return {
            "index": 0,
            "logprobs": self._logprobs(positions) if positions else None,
            "finish_reason": _finish_reason(finished) if finished is not None else None,
            "stop_reason": (finished.stop_match or None) if finished is not None else None,
        }

    def _piece(self, choice: Json) -> Json:
        body = self._head | {"object": self.piece_object, "choices": [choice]}
        if self._multilora:
            body, self._multilora = body | {"multilora": self._multilora}, {}
        return body


class CompletionFormat(AnswerFormat):
    whole_object = piece_object = "text_completion"

    def _whole_choice(self, text: str) -> Json:
        return {"text": text}

    def _piece_choice(self, text: str | None) -> Json:
        return {"text": text or ""}

    def _logprobs(self, positions: Sequence[PositionLogprobs]) -> Json:
        tokens = [position.chosen.token for position in positions]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [position.chosen.logprob for position in positions],
            "top_logprobs": [_by_text(position) for position in positions],
            "text_offset": offsets,
        }


class ChatFormat(AnswerFormat):
    whole_object, piece_object = "chat.completion", "chat.completion.chunk"

    def first(self) -> Json | None:
        return self._piece({"delta": {"role": "assistant", "content": ""}} | self._choice((), None))

    def _whole_choice(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text}}

    def _piece_choice(self, text: str | None) -> Json:
        return {"delta": {} if text is None else {"content": text}}

    def _logprobs(self, positions: Sequence[PositionLogprobs]) -> Json:
        return {
            "content": [
                _chat_choice(position.chosen) | {"top_logprobs": [_chat_choice(choice) for choice in position.top]}
                for position in positions
            ]
        }


def usage(finished: Finished) -> Json:
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": finished.cached_tokens},
    }


def _finish_reason(finished: Finished) -> str:
    if finished.reason == "CANCELLED":
        raise Unavailable("CANCELLED", "the server cancelled the answer before it was complete; ask again")
    return FINISH_REASONS[finished.reason]


def _binding(started: Started) -> Json:
    adapter = started.adapter
    if adapter is None:
        return {"adapter": None, "version": None, "digest": None, "tier": None}
    return {"adapter": adapter.name, "version": adapter.version, "digest": adapter.digest, "tier": started.tier}


def _by_text(position: PositionLogprobs) -> dict[str, float]:
    """Log-probabilities by token text, the chosen token among them; of two tokens of one text the likelier stays."""
    by_text: dict[str, float] = {}
    for choice in (*position.top, position.chosen):
        by_text.setdefault(choice.token, choice.logprob)
    return by_text


def _chat_choice(choice: TokenChoice) -> Json:
    """`bytes` is None for a token that is part of a character: its text does not tell them."""
    whole = "\N{REPLACEMENT CHARACTER}" not in choice.token
    data = list(choice.token.encode()) if whole else None
    return {"token": choice.token, "logprob": choice.logprob, "bytes": data}
