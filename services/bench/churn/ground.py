"""What the scenarios stand on: a store with a fleet of random adapters, replicas that pull from it, and ratios."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.bench import servers
from services.bench.load.answer import Answer
from services.bench.load.driver import run_load
from services.bench.load.plan import Load
from services.bench.load.targets import Target
from services.bench.results import Figure, spread
from services.bench.servers import Replica
from services.common.gguf_config import config_from_gguf, open_gguf

RANK = 16
MODEL_NAME = "bench-model"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything.

    rounds: of A, B after the one that warms up; prompts: requests of a closed load; seconds: of a timed block
    registered: adapters in the big catalogue
    """

    rounds: int
    prompts: int
    input_len: int
    output_len: int
    seconds: float
    registered: int
    vocab_size: int = 1000

    def load(self, number: int, **settings: Any) -> Load:
        """The load of round `number`: equal for what is compared, new prompts in each round."""
        given = {
            "num_prompts": self.prompts,
            "random_input_len": self.input_len,
            "random_output_len": self.output_len,
            "vocab_size": self.vocab_size,
            "seed": number,
        }
        return Load(**(given | settings))


@dataclass(frozen=True, slots=True)
class Ground:
    """work: a directory of the scenario's own; store: host:port of the shared store; fleet: its adapters' names."""

    work: Path
    model: Path
    flags: tuple[str, ...]
    sizes: Sizes
    store: str
    fleet: Sequence[str]

    @contextlib.contextmanager
    def replica(self, name: str, *flags: str, store: str = "") -> Iterator[Replica]:
        """An inference service that pulls from the store."""
        with inference(self.work / name, self.model, *self.flags, *flags, store=store or self.store) as running:
            yield running

    def setup(self, **more: Any) -> dict[str, Any]:
        """What every result says of its circumstances."""
        sizes = self.sizes
        return {
            "model": self.model.name,
            "server_flags": list(self.flags),
            "rank": RANK,
            "rounds": sizes.rounds,
            "input_len": sizes.input_len,
            "output_len": sizes.output_len,
            **more,
        }


@contextlib.contextmanager
def inference(data_dir: Path, model: Path, *flags: str, store: str) -> Iterator[Replica]:
    own = ("--served-model-name", MODEL_NAME, "--max-lora-rank", str(RANK), "--adapter-store", store)
    with servers.inference(data_dir, model, *own, *flags) as running:
        yield running


def model_config(model: Path) -> dict[str, Any]:
    """A model's config in Hugging Face's fields, from its directory or GGUF file."""
    config = json.loads((model / "config.json").read_text()) if model.is_dir() else config_from_gguf(open_gguf(model))
    return dict(config)


async def alternate_loads(
    targets: Mapping[str, Target], load: Callable[[int], Load], adapters: Sequence[str], rounds: int
) -> dict[str, list[list[Answer]]]:
    """The same load on each target, A, B, A, B …; the first round warms caches and is not counted."""
    found: dict[str, list[list[Answer]]] = {name: [] for name in targets}
    for number in range(rounds + 1):
        for name, target in targets.items():
            answers = await run_load(target, load(number), adapters)
            if number:
                found[name].append(answers)
    return found


def ratio_figure(name: str, ratios: Sequence[float], target: float, *, at_most: bool, note: str = "") -> Figure:
    """The median over the rounds, with the spread beside it."""
    found = spread(ratios)
    beside = f"{found['low']:g} to {found['high']:g}" + (f"; {note}" if note else "")
    return Figure(name, found["median"], "", target, at_most=at_most, note=beside)


def failures(answers: Sequence[Answer]) -> Figure:
    """No request may fail, in any scenario."""
    errors = sorted({answer.error for answer in answers if answer.error})
    return Figure(
        "failed requests",
        sum(bool(answer.error) for answer in answers),
        "",
        0,
        at_most=True,
        note=f"of {len(answers)}" + (f": {', '.join(errors)}" if errors else ""),
    )
