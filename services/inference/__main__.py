"""The `multilora-inference` command."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import Any

from services.common.auth.credentials import Credentials
from services.common.auth.settings import Security
from services.common.errors import MultiloraError
from services.inference.config import EXIT_ENGINE_DIED, LOG_FORMAT, AdapterConfig, ConfigError, ServerConfig

EXIT_USAGE = 2


def _parser() -> argparse.ArgumentParser:
    defaults, room = {f.name: f.default for f in dataclasses.fields(ServerConfig)}, AdapterConfig()
    parser = argparse.ArgumentParser(
        prog="multilora-inference",
        description="Serves a base model and its LoRA adapters over gRPC and HTTP. When the engine dies, its streams "
        f"end with ENGINE_DIED and the service exits with {EXIT_ENGINE_DIED}, to be started again from nothing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def add(flag: str, default: Any, text: str, kind: Any = None) -> None:
        parser.add_argument(flag, type=kind or type(default), default=default, help=text)

    parser.add_argument("--model", type=Path, required=True, help="Hugging Face model directory, or a .gguf file")
    add("--served-model-name", "", "name of the base model for clients and adapters; empty: the directory's or file's")
    add("--dtype", defaults["dtype"], "float32 or bfloat16 on a CPU, bfloat16 or float16 on a GPU; auto is the first")
    add("--device", defaults["device"], "cpu or cuda")
    add("--cpu-backend", defaults["cpu_backend"], "auto, compiled or torch; auto is compiled where it can be had")
    add("--quantization", defaults["quantization"], "none, or int8: base weights in eight bits; compiled CPU path")
    add("--host", defaults["host"], "address to listen on")
    add("--port", defaults["port"], "gRPC port; 0 takes a free one")
    add("--http-port", defaults["http_port"], "HTTP port; 0 takes a free one, -1 serves no HTTP", int)
    add("--admin-port", None, "port of AdapterControlService; 0 takes a free one, -1 --port; none: --port + 10", int)
    Security.add_flags(parser)
    add("--adapter-store", "", "host:port of the adapter store; empty: the base model alone")
    add("--adapter-store-admin", "", "host:port where it is administered; empty: the port + 10")
    add("--adapter-store-token-file", None, "file of a replica's token, read at every call", Path)
    add("--adapter-store-ca", None, "CA of the store's certificate, PEM; none: plain text", Path)
    add("--adapter-store-cert", None, "certificate that the store is shown, PEM", Path)
    add("--adapter-store-key", None, "its private key, PEM", Path)
    add("--adapter-root", None, "directory beneath which adapters may be loaded by path; none: refused", Path)
    add("--warm-adapters", (), "references, by commas, that must be resident before the service is ready", _names)
    add("--data-dir", defaults["data_dir"], "where pulled adapters are cached", Path)
    add("--max-loras", room.max_loras, "most adapters resident at once")
    add("--max-resident-loras", room.max_resident_loras, "the same, as far as the pages go; 0: --max-loras")
    add("--max-lora-rank", room.max_lora_rank, "highest rank a module may have, 1 to 512")
    add("--max-cpu-loras", room.max_cpu_loras, "most adapters in host memory")
    add("--max-cpu-bytes", room.max_cpu_bytes, "bytes of adapters in host memory; 0: their number alone counts")
    add("--adapter-idle-ttl", room.adapter_idle_ttl, "seconds an unused adapter stays resident; 0: until evicted")
    add("--max-disk-bytes", room.max_disk_bytes, "bytes of packed adapters kept on disk")
    add("--max-model-len", defaults["max_model_len"], "most tokens of prompt and answer; 0: the model's own")
    add("--max-num-seqs", defaults["max_num_seqs"], "most requests running at once")
    add("--max-num-batched-tokens", defaults["max_num_batched_tokens"], "most tokens in one step")
    add("--block-size", defaults["block_size"], "tokens a KV block holds")
    add("--max-waiting-requests", defaults["max_waiting_requests"], "most requests that wait; more are refused")
    parser.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=defaults["enable_prefix_caching"],
        help="share what is computed of a common beginning",
    )
    add("--turn-tokens", defaults["turn_tokens"], "tokens before an adapter's slot may pass to one that waits")
    add("--step-seconds", defaults["step_seconds"], "seconds a step with prompts in it should take at most")
    parser.add_argument(
        "--share-weight",
        dest="weights",
        action="append",
        type=_weight,
        default=[],
        metavar="NAME=W",
        help="fair share of a tenant, or of an adapter (tenant/name) within it, where it is not 1; may be repeated",
    )
    add("--kv-cache-memory-bytes", defaults["kv_cache_memory_bytes"], "bytes of the KV cache, on a CPU")
    add("--gpu-memory-utilization", defaults["gpu_memory_utilization"], "share of a GPU that may be taken")
    add("--tensor-parallel-size", defaults["tensor_parallel_size"], "processes, a GPU each, the model is cut among")
    parser.add_argument(
        "--fully-sharded-loras",
        action=argparse.BooleanOptionalAction,
        default=defaults["fully_sharded_loras"],
        help="cut the other half of adapters too: less memory, and sums of their shrink results",
    )
    add("--threads", defaults["threads"], "threads of the forward pass; 0: the cores this process may use")
    parser.add_argument(
        "--engine-process",
        action=argparse.BooleanOptionalAction,
        default=defaults["engine_process"],
        help="run the engine in a process of its own",
    )
    add("--max-unread-tokens", defaults["max_unread_tokens"], "tokens a client may leave unread before it is cancelled")
    add("--metrics-top-adapters", defaults["metrics_top_adapters"], "adapters with metrics of their own; rest: `other`")
    add("--shutdown-grace", defaults["shutdown_grace"], "seconds running requests have to finish at shutdown")
    add("--log-level", "info", "debug, info, warning or error")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _weight(text: str) -> tuple[str, float]:
    name, _, weight = text.rpartition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=W")
    return name, float(weight)


def _config(arguments: argparse.Namespace) -> ServerConfig:
    values = vars(arguments)
    values.pop("log_level")
    adapters = {field.name: values.pop(field.name) for field in dataclasses.fields(AdapterConfig)}
    values["http_port"] = None if values["http_port"] < 0 else values["http_port"]
    values["weights"] = dict(values["weights"])
    values["adapter_store"] = values["adapter_store"] or None
    values["security"] = Security.of_flags(arguments)
    values["store_credentials"] = Credentials(
        **{name: values.pop(f"adapter_store_{name}") for name in ("ca", "cert", "key", "token_file")}
    )
    return ServerConfig(**values, adapters=AdapterConfig(**adapters))


async def _serve(config: ServerConfig) -> None:
    from services.common.process import settle
    from services.common.rpc import first_of, wait_for_signal
    from services.inference.server import serve

    async with serve(config) as running:
        settle()
        where = f"grpc={config.host}:{running.port}"
        if running.http_port is not None:
            where += f" http={config.host}:{running.http_port}"
        if running.admin_port != running.port:
            where += f" admin={config.host}:{running.admin_port}"
        print(f"listening on {where}", flush=True)
        await first_of(wait_for_signal(), running.serving.engine.died.wait())
        death = running.serving.engine.death
    if death is not None:
        print(f"multilora-inference: the engine has died: {death.error}", file=sys.stderr)
        sys.exit(EXIT_ENGINE_DIED)


def main() -> None:
    """Serve until SIGTERM or SIGINT.

    Exits with 2 and one line when the settings cannot work, and with 70 and one line when the engine has died: what
    starts this process again (Kubernetes, systemd) gives it clean memory, and knows how to wait between attempts.
    """
    arguments = _parser().parse_args()
    # Before torch loads OpenMP: its threads spin between steps by default, on the cores that the face and the store
    # need, and tests beside other work took 34 s, not 6. Asleep at once, a thousand times a step of torch's, they must
    # be woken: 71 tokens/s of the torch path where a short spin gave 125, on two virtual cores of a Zen 5.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    logging.basicConfig(level=arguments.log_level.upper(), format=LOG_FORMAT)
    try:
        asyncio.run(_serve(_config(arguments)))
    except (ConfigError, MultiloraError) as error:
        print(f"multilora-inference: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)


if __name__ == "__main__":
    main()
