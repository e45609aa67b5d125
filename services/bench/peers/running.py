"""The peers as running programs: vLLM's server, and PEFT's batch behind a pipe."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.bench.servers import DidNotStart

READY_SECONDS = 600.0
POLL_SECONDS = 0.5
STOP_SECONDS = 30.0
KV_CACHE_GIB = 1


@contextlib.contextmanager
def vllm(python: Path, model: Path, name: str, adapters: Mapping[str, Path], work: Path, *flags: str) -> Iterator[str]:
    """`vllm serve` in bf16 with these adapters by name: its base URL once it is healthy."""
    work.mkdir(parents=True, exist_ok=True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [str(python.with_name("vllm")), "serve", str(model), "--served-model-name", name, "--dtype", "bfloat16"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--no-enable-log-requests", *flags]
    if adapters:
        command += ["--lora-modules", *(f"{adapter}={path}" for adapter, path in adapters.items())]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    # as its documentation asks for; compiled graphs are kept beside it, so that only the first start takes minutes
    if preload := list(python.parents[1].glob("lib/libiomp5.so")):
        environment["LD_PRELOAD"] = str(preload[0])
    environment["VLLM_CACHE_ROOT"] = str(python.parents[2] / "vllm-cache")
    log = work / "vllm.log"
    with log.open("w") as output, _group(command, output, environment) as process:
        url = f"http://127.0.0.1:{port}"
        give_up = time.monotonic() + READY_SECONDS
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() > give_up:
                raise DidNotStart(f"vLLM did not start; {log} ends with:\n{log.read_text()[-2000:]}")
            time.sleep(POLL_SECONDS)
        yield url


@dataclass(frozen=True)
class MixedBatch:
    """PEFT with adapters loaded; `process` reads prompts and answers with seconds."""

    process: subprocess.Popen[str]

    def seconds(self, prompts: Sequence[Sequence[int]]) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([list(prompt) for prompt in prompts]) + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


@contextlib.contextmanager
def peft(python: Path, model: Path, adapters: Sequence[Path], new_tokens: int, work: Path) -> Iterator[MixedBatch]:
    work.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).with_name("mixed_batch.py")
    log = work / "peft.log"
    command = [str(python), str(script), str(model), str(new_tokens), *map(str, adapters)]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=_bare_environment()
        ) as process,
    ):
        try:
            assert process.stdout is not None
            if process.stdout.readline().strip() != "ready":
                raise DidNotStart(f"PEFT did not start; {log} ends with:\n{log.read_text()[-2000:]}")
            yield MixedBatch(process)
        finally:
            process.kill()


@contextlib.contextmanager
def _group(command: Sequence[str], output: object, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A program in a process group of its own, so that the processes it starts end with it."""
    with subprocess.Popen(
        command,
        stdout=output,  # type: ignore[call-overload]
        stderr=subprocess.STDOUT,
        env=_bare_environment() | dict(environment),
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _bare_environment() -> dict[str, str]:
    """Ours without the path to our own packages: a peer's environment is whole."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
