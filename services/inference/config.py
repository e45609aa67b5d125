"""What the inference service is told at start: frozen, checked at construction, passed on explicitly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from services.common.auth.credentials import Credentials
from services.common.auth.settings import SAME_PORT, Security, admin_port

MAX_LORA_RANK = 512
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float16")}
"""What each device serves; auto takes the first."""
EXIT_ENGINE_DIED = 70
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class ConfigError(ValueError):
    """A setting that cannot work; the message names the flag and what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """Room for adapters.

    max_loras: adapters of the highest rank for which the slot pool has pages; most adapters resident in it
    max_lora_rank: highest rank a module may have; with max_loras it sizes the pool
    max_resident_loras: most adapters resident, as far as the pages go; 0 is max_loras
    max_cpu_loras: most adapters in host memory
    max_cpu_bytes: most bytes of adapters in host memory; 0 bounds their number alone
    adapter_idle_ttl: seconds after which an adapter that nobody asks for leaves the slot pool; 0 keeps it
    max_disk_bytes: bytes of packed adapters kept on this node's disk
    """

    max_loras: int = 8
    max_lora_rank: int = 64
    max_resident_loras: int = 0
    max_cpu_loras: int = 32
    max_cpu_bytes: int = 0
    adapter_idle_ttl: float = 0.0
    max_disk_bytes: int = 8 << 30

    def __post_init__(self) -> None:
        _at_least("--max-loras", self.max_loras, 1)
        _at_least("--max-lora-rank", self.max_lora_rank, 1)
        _at_least("--max-disk-bytes", self.max_disk_bytes, 1)
        if self.max_lora_rank > MAX_LORA_RANK:
            raise ConfigError(f"--max-lora-rank is {self.max_lora_rank}; at most {MAX_LORA_RANK} is served")
        _at_least("--max-cpu-bytes", self.max_cpu_bytes, 0)
        if not 0 <= self.adapter_idle_ttl < float("inf"):
            raise ConfigError(f"--adapter-idle-ttl is {self.adapter_idle_ttl}; give seconds, or 0 for no limit")
        if self.max_resident_loras and self.max_resident_loras < self.max_loras:
            raise ConfigError(
                f"--max-resident-loras ({self.max_resident_loras}) is below --max-loras ({self.max_loras}), which it "
                "raises; leave it out or raise it"
            )
        if self.max_cpu_loras < self.num_slots:
            flag = "--max-resident-loras" if self.max_resident_loras else "--max-loras"
            raise ConfigError(
                f"--max-cpu-loras ({self.max_cpu_loras}) is below {flag} ({self.num_slots}): "
                "every resident adapter also has its copy in host memory; raise the first or lower the second"
            )

    @property
    def num_slots(self) -> int:
        """Most adapters resident in the slot pool."""
        return self.max_resident_loras or self.max_loras


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What one engine step may hold.

    max_model_len: most tokens of prompt and answer together
    max_num_seqs: most requests running at once
    max_num_batched_tokens: most tokens in one step; longer prompts are cut into chunks
    block_size: tokens a KV block holds
    num_blocks: KV blocks, the null block included
    max_waiting_requests: most requests that wait to be admitted; one adapter's may be half of what others leave
    enable_prefix_caching: whether requests share the blocks of a common beginning
    turn_tokens: tokens of a request before its adapter's slot may pass to another that waits
    step_seconds: seconds that a step with prompts in it should take at most
    weights: fair shares of tenants (`acme`) and of adapters (`acme/pirate`), where they are not 1
    """

    max_model_len: int
    num_blocks: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    block_size: int = 16
    max_waiting_requests: int = 1024
    enable_prefix_caching: bool = True
    turn_tokens: int = 32
    step_seconds: float = 0.1
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _at_least("--max-model-len", self.max_model_len, 2)
        _at_least("--max-waiting-requests", self.max_waiting_requests, 1)
        _at_least("--turn-tokens", self.turn_tokens, 1)
        if not self.step_seconds > 0:
            raise ConfigError(f"--step-seconds is {self.step_seconds}; it must be above 0")
        for name, weight in self.weights.items():
            if not 0 < weight < float("inf"):
                raise ConfigError(f"--share-weight {name}={weight}: a weight must be above 0 and finite")
        _at_least("--max-num-seqs", self.max_num_seqs, 1)
        _at_least("--block-size", self.block_size, 1)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens ({self.max_num_batched_tokens}) is below --max-num-seqs "
                f"({self.max_num_seqs}): every running request needs a token of each step"
            )
        room = (self.num_blocks - 1) * self.block_size
        if room < self.max_model_len:
            raise ConfigError(
                f"the KV cache holds {room} tokens, fewer than --max-model-len ({self.max_model_len}); "
                "raise --kv-cache-memory-bytes or lower --max-model-len"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Everything the command line says; see the configs above for what they share with it.

    max_model_len: 0 takes the model's own length
    http_port: None serves no HTTP
    admin_port: of AdapterControlService; None is 10 above the other port, -1 that port itself
    security: who may call
    adapter_store: host:port of the store; None serves the base model alone
    adapter_store_admin: where it is administered; empty is 10 ports above
    store_credentials: what the store is shown
    adapter_root: directory beneath which adapters may be loaded by path; None refuses paths
    warm_adapters: adapter references that must be resident before the service is ready
    kv_cache_memory_bytes: bytes of the KV cache on a CPU
    gpu_memory_utilization: share of a device's memory that may be taken; the KV cache gets what the rest leaves of it
    tensor_parallel_size: processes that the model is cut among, each with a part of its heads and of its MLPs
    fully_sharded_loras: whether they cut the other half of each adapter too, and sum its shrink results
    threads: 0 takes the cores this process may use
    engine_process: whether the engine runs in a process of its own
    metrics_top_adapters: adapters with metrics of their own; the others' are one
    max_unread_tokens: tokens that may wait for a client that does not read them, before its request is cancelled
    cpu_backend: compiled, torch, or auto, which is compiled where it can be had
    quantization: of the base weights, none or int8; adapters, activations and cache stay as they are
    """

    model: Path
    served_model_name: str = ""
    dtype: str = "auto"
    device: str = "cpu"
    cpu_backend: str = "auto"
    quantization: str = "none"
    host: str = "127.0.0.1"
    port: int = 50051
    admin_port: int | None = None
    security: Security = field(default_factory=Security)
    http_port: int | None = 8000
    adapter_store: str | None = None
    adapter_store_admin: str = ""
    store_credentials: Credentials = field(default_factory=Credentials)
    adapter_root: Path | None = None
    warm_adapters: tuple[str, ...] = ()
    data_dir: Path = Path(".data/inference")
    max_model_len: int = 0
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    block_size: int = 16
    max_waiting_requests: int = 1024
    enable_prefix_caching: bool = True
    turn_tokens: int = 32
    step_seconds: float = 0.1
    weights: Mapping[str, float] = field(default_factory=dict)
    kv_cache_memory_bytes: int = 1 << 30
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    fully_sharded_loras: bool = False
    shutdown_grace: float = 30.0
    threads: int = 0
    engine_process: bool = True
    max_unread_tokens: int = 4096
    metrics_top_adapters: int = 100
    adapters: AdapterConfig = field(default_factory=AdapterConfig)

    def __post_init__(self) -> None:
        self.security.check_host(self.host)
        if not SAME_PORT <= admin_port(self.admin_port, self.port) <= 65535:
            raise ConfigError(f"--admin-port is {self.admin_port}; it must be 0 to 65535, or {SAME_PORT}")
        _at_least("--max-unread-tokens", self.max_unread_tokens, 1)
        _at_least("--metrics-top-adapters", self.metrics_top_adapters, 1)
        if self.device not in DTYPES:
            raise ConfigError(f"--device is {self.device!r}; there are {' and '.join(DTYPES)}")
        if self.dtype not in ("auto", *DTYPES[self.device]):
            served = ", ".join(("auto", *DTYPES[self.device]))
            raise ConfigError(f"--dtype is {self.dtype!r}; served on --device {self.device} are {served}")
        _at_least("--tensor-parallel-size", self.tensor_parallel_size, 1)
        if self.tensor_parallel_size > 1 and self.cpu_backend == "compiled":
            raise ConfigError(
                f"--tensor-parallel-size is {self.tensor_parallel_size} and --cpu-backend compiled, which runs on one "
                "rank alone; leave one of them out"
            )
        if self.fully_sharded_loras and self.tensor_parallel_size == 1:
            raise ConfigError("--fully-sharded-loras needs --tensor-parallel-size of 2 or more: one rank cuts nothing")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"--gpu-memory-utilization is {self.gpu_memory_utilization}; it must be above 0, up to 1")
        if self.cpu_backend not in ("auto", "compiled", "torch"):
            raise ConfigError(f"--cpu-backend is {self.cpu_backend!r}; there are auto, compiled and torch")
        self._check_quantization()
        if not self.model.exists():
            raise ConfigError(f"--model: nothing is at {self.model}; give a Hugging Face directory or a .gguf file")
        if self.adapter_root is not None and not self.adapter_root.is_dir():
            raise ConfigError(f"--adapter-root: {self.adapter_root} is no directory")
        if self.warm_adapters and self.adapter_store is None:
            raise ConfigError("--warm-adapters needs --adapter-store: they come from there")
        if len(self.warm_adapters) > self.adapters.num_slots:
            raise ConfigError(
                f"--warm-adapters names {len(self.warm_adapters)}, and --max-loras has {self.adapters.num_slots} slots"
            )

    def _check_quantization(self) -> None:
        if self.quantization not in ("none", "int8"):
            raise ConfigError(f"--quantization is {self.quantization!r}; there are none and int8")
        if self.quantization == "none":
            return
        others = {
            f"--device {self.device}": self.device != "cpu",
            "--cpu-backend torch": self.cpu_backend == "torch",
            f"--tensor-parallel-size {self.tensor_parallel_size}": self.tensor_parallel_size > 1,
        }
        for other, given in others.items():
            if given:
                raise ConfigError(
                    f"--quantization is {self.quantization}, which the compiled CPU path alone serves, and {other} is "
                    "another; leave one of them out"
                )

    @property
    def model_dtype(self) -> str:
        """The dtype of weights, adapters and KV cache."""
        return DTYPES[self.device][0] if self.dtype == "auto" else self.dtype


def _at_least(flag: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{flag} is {value}; it must be at least {least}")
