"""Text to token ids and back, through the tokenizers library; chat templates through Jinja's sandbox."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers.decoders import DecodeStream

from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.gguf_config import gguf_field, open_gguf
from services.inference.gguf_tokenizer import tokenizer_from_gguf


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One turn of a conversation."""

    role: str
    content: str


class Tokenizer:
    """The served model's vocabulary and chat template.

    eos_token_ids: ids that end an answer unless the caller ignores them
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        eos_token_ids: frozenset[int],
        chat_template: str | None = None,
        special_tokens: dict[str, str] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens or {}
        self._template = _environment().from_string(chat_template) if chat_template else None
        self.eos_token_ids = eos_token_ids

    @classmethod
    def load(cls, path: Path, eos_token_ids: frozenset[int]) -> Tokenizer:
        """From a Hugging Face directory or a .gguf file. Raises FailedPrecondition naming what is missing."""
        return _from_directory(path, eos_token_ids) if path.is_dir() else _from_gguf(path, eos_token_ids)

    def encode(self, text: str) -> list[int]:
        """Plain text, with the special tokens the tokenizer itself adds."""
        return list(self._tokenizer.encode(text).ids)

    def encode_chat(self, turns: Sequence[ChatTurn]) -> list[int]:
        """A conversation in the chat template, the assistant's turn opened. Raises InvalidArgument."""
        if self._template is None:
            raise InvalidArgument(
                "NO_CHAT_TEMPLATE", "this model has no chat template; send text or token ids", field="messages"
            )
        try:
            text = self._template.render(
                messages=[asdict(turn) for turn in turns], add_generation_prompt=True, **self._special_tokens
            )
        except TemplateError as error:
            raise InvalidArgument(
                "INVALID_CHAT", f"messages: the model's chat template refuses them: {error.message}", field="messages"
            ) from error
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def decode_stream(self) -> Callable[[int], str]:
        """A function from each next id to the text that became certain with it, special tokens left out."""
        stream = DecodeStream(skip_special_tokens=True)
        return lambda token_id: stream.step(self._tokenizer, token_id) or ""

    def token_text(self, token_id: int) -> str:
        """The text of one token, special ones too."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)


def _from_directory(path: Path, eos_token_ids: frozenset[int]) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.exists():
        raise FailedPrecondition(
            "TOKENIZER_MISSING", f"--model: {path} has no tokenizer.json; export it beside the model"
        )
    config: dict[str, Any] = {}
    if (config_file := path / "tokenizer_config.json").exists():
        config = json.loads(config_file.read_text())
    template = config.get("chat_template")
    if (template_file := path / "chat_template.jinja").exists():
        template = template_file.read_text()
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    special = {
        key: _token(config[key]) for key in ("bos_token", "eos_token", "unk_token", "pad_token") if config.get(key)
    }
    return Tokenizer(
        tokenizers.Tokenizer.from_file(str(file)),
        eos_token_ids=eos_token_ids,
        chat_template=template,
        special_tokens=special,
    )


def _from_gguf(path: Path, eos_token_ids: frozenset[int]) -> Tokenizer:
    reader = open_gguf(path)
    tokens = gguf_field(reader, "tokenizer.ggml.tokens")
    special = {
        f"{name}_token": tokens[index]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (index := gguf_field(reader, f"tokenizer.ggml.{key}_token_id")) is not None
    }
    return Tokenizer(
        tokenizer_from_gguf(reader),
        eos_token_ids=eos_token_ids,
        chat_template=gguf_field(reader, "tokenizer.chat_template"),
        special_tokens=special,
    )


def _token(entry: str | dict[str, Any]) -> str:
    return entry if isinstance(entry, str) else str(entry["content"])


def _environment() -> ImmutableSandboxedEnvironment:
    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return environment
