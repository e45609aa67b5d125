"""Fuzz one parser with atheris: `python -m tests.fuzz.run NAME --seconds 60`, NAME one of targets.py, or `all`.

Ends with 0 when nothing was found. An input that breaks something is kept as `<--keep>/crash-…`; give such a file as
`--input` to see it again. Coverage leads the way, so the parsers are imported under atheris' eyes.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

INSTRUMENTED = ["services.adapter_store", "services.common", "json"]
NAMES = ("safetensors", "config", "packed", "log_entry", "reference")
MEMORY_MIB = 1024
INPUT_SECONDS = 10


def fuzz(name: str, arguments: list[str]) -> None:
    """Never returns: libFuzzer ends the process."""
    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz.targets import TARGETS, dictionary

    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as directory:
        corpus, words = Path(directory, "corpus"), Path(directory, "dictionary")
        corpus.mkdir()
        for number, seed in enumerate(target.seeds()):
            target(seed)
            (corpus / str(number)).write_bytes(seed)
        words.write_text(dictionary(target))
        limits = [f"-max_len={target.max_bytes}", f"-rss_limit_mb={MEMORY_MIB}", f"-timeout={INPUT_SECONDS}"]
        files = [] if any(not argument.startswith("-") for argument in arguments) else [str(corpus)]
        rng = random.Random(name)

        def mutate(data: bytes, max_size: int, seed: int) -> bytes:
            if rng.random() < 0.5:
                return target.mutate(data, seed)[:max_size]
            return atheris.Mutate(data, max_size)

        atheris.Setup([sys.argv[0], *limits, f"-dict={words}", *arguments, *files], target, custom_mutator=mutate)
        atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*NAMES, "all"])
    parser.add_argument("--seconds", type=int, default=60, help="how long, each")
    parser.add_argument("--runs", type=int, default=-1, help="how many inputs, each; -1: as many as there is time for")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path.cwd(), help="where inputs that break something go")
    parser.add_argument("--input", type=Path, help="only this one")
    given = parser.parse_args()
    if given.name == "all":
        own = sys.argv[1:]
        own.remove("all")
        commands = [[sys.executable, "-m", "tests.fuzz.run", name, *own] for name in NAMES]
        return max(subprocess.run(command, check=False).returncode != 0 for command in commands)
    arguments = [
        f"-max_total_time={given.seconds}",
        f"-runs={given.runs}",
        f"-seed={given.seed}",
        f"-artifact_prefix={given.keep}/",
    ]
    fuzz(given.name, [*arguments, str(given.input)] if given.input else arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
