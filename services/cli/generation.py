"""`multilora generate` and `multilora chat`: text from the inference service as it comes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.exit_codes import one_line
from services.cli.targets import UINT32_MAX, UINT64_MAX, Targets, targets
from services.common.errors import MultiloraError, Unavailable

if TYPE_CHECKING:
    from multilora.inference.v1 import inference_pb2

Adapter = Annotated[
    str, typer.Option(help="Adapter reference: name, name@3, name:canary, tenant/name; empty is the base model.")
]
MaxTokens = Annotated[int | None, typer.Option(min=1, max=UINT32_MAX, help="Most tokens to generate.")]
Temperature = Annotated[
    float | None, typer.Option(help="0 is greedy. Default 0 without other sampling options, else 1.")
]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this sum of probabilities.")]
TopK = Annotated[int | None, typer.Option(min=0, max=UINT32_MAX, help="Keep this many likeliest tokens; 0 keeps all.")]
Seed = Annotated[int | None, typer.Option(min=0, max=UINT64_MAX, help="Equal seeds give equal answers.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer; repeatable.")]


def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt; `-` reads it from stdin.")],
    adapter: Adapter = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Send PROMPT as a user's message, or as plain text to go on from.")
    ] = False,
) -> None:
    """Generate from PROMPT and print the text as it comes.

    PROMPT is sent as plain text that the model goes on from, unless --chat puts it into the model's chat template.
    """
    from multilora.inference.v1 import inference_pb2

    text = sys.stdin.read() if prompt == "-" else prompt
    request = inference_pb2.GenerateRequest(adapter=adapter)
    if chat:
        request.messages.messages.add(role="user", content=text)
    else:
        request.text = text
    _set_options(request, max_tokens, temperature, top_p, top_k, seed, stop)
    _stream(targets(context), request, _write)
    typer.echo()


def chat(
    context: typer.Context,
    adapter: Adapter = "",
    system: Annotated[str, typer.Option(help="System message to begin with.")] = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
) -> None:
    """Talk with the model, turn by turn; the conversation so far goes along.

    /reset forgets the conversation, /adapter REF goes on with another adapter, /quit or Ctrl-D ends.
    """
    from multilora.inference.v1 import inference_pb2

    opening = [inference_pb2.ChatMessage(role="system", content=system)] if system else []
    history = list(opening)
    while (line := _ask()) is not None:
        command, _, argument = line.partition(" ")
        if command == "/reset":
            history = list(opening)
        elif command == "/adapter":
            adapter = argument.strip()
        elif command == "/quit":
            break
        elif line:
            turn = inference_pb2.ChatMessage(role="user", content=line)
            messages = inference_pb2.ChatMessages(messages=[*history, turn])
            request = inference_pb2.GenerateRequest(adapter=adapter, messages=messages)
            _set_options(request, max_tokens, temperature, top_p, top_k, seed, None)
            answer = _answer(targets(context), request)
            if answer is not None:
                history += [turn, inference_pb2.ChatMessage(role="assistant", content=answer)]


def _ask() -> str | None:
    """The next line, stripped; None at the end of input. A person gets a prompt and line editing."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip() if line else None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (being imported is what makes input() edit lines)
    try:
        return input("> ").strip()
    except EOFError:
        typer.echo()
        return None


def _answer(where: Targets, request: inference_pb2.GenerateRequest) -> str | None:
    """Print one answer and return it; None when it failed, or Ctrl-C ended it: the turn is forgotten then."""
    parts: list[str] = []

    def write(text: str) -> None:
        parts.append(text)
        _write(text)

    try:
        _stream(where, request, write)
    except MultiloraError as error:
        typer.echo(f"multilora: {one_line(error)}", err=True)
        return None
    except KeyboardInterrupt:
        typer.echo("\n(stopped)", err=True)
        return None
    typer.echo()
    return "".join(parts)


def _stream(where: Targets, request: inference_pb2.GenerateRequest, write: Callable[[str], None]) -> None:
    """Generate, giving `write` each piece of text. Raises Unavailable when the server cancelled the answer."""
    from multilora.inference.v1 import inference_pb2
    from services.cli.clients import inference

    with inference(where) as client:
        for event in client.Generate(request, timeout=where.timeout):
            write(event.chunk.text)
            if event.finished.reason == inference_pb2.FINISH_REASON_CANCELLED:
                raise Unavailable("CANCELLED", "the server cancelled the answer before it was complete; ask again")


def _set_options(
    request: inference_pb2.GenerateRequest,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    stop: list[str] | None,
) -> None:
    """Set what was given and nothing else: unset is not zero."""
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    for name, value in given.items():
        if value is not None:
            setattr(request.sampling, name, value)
    if max_tokens is not None:
        request.stopping.max_tokens = max_tokens
    request.stopping.stop.extend(stop or ())


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
