"""Who may import whom. The architecture is these few rules; a test keeps them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PROTO_USERS = {
    "services/adapter_store/admin_servicer.py",
    "services/adapter_store/receiving.py",
    "services/adapter_store/servicer.py",
    "services/adapter_store/convert.py",
    "services/common/wire.py",
    "services/inference/servicer.py",
    "services/inference/control_servicer.py",
    "services/inference/conversion.py",
    "services/inference/server.py",
    "services/inference/adapters/store_client.py",
}


def modules(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "_pb2" not in path.name)


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, lazily too, by its full name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""


def offenders(folder: str, allowed: tuple[str, ...]) -> list[str]:
    """Imports in `folder` beyond the standard library and `allowed` (packages, with what lies beneath)."""
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(folder)
        for name in imports(path)
        if name.split(".")[0] not in sys.stdlib_module_names
        and not any(name == package or name.startswith(f"{package}.") for package in allowed)
    ]


def importers(folder: str, package: str) -> list[str]:
    return [
        str(path.relative_to(ROOT))
        for path in modules(folder)
        if any(name == package or name.startswith(f"{package}.") for name in imports(path))
    ]


def test_kernels_import_numpy_torch_and_triton_only() -> None:
    assert offenders("kernels/lora_kernels", ("lora_kernels", "numpy", "torch", "triton")) == []
    assert offenders("kernels/attention_kernels", ("attention_kernels", "torch", "triton")) == []


def test_kernel_benchmarks_run_on_a_bare_image() -> None:
    assert offenders("kernels/bench", ("kernels.bench", "lora_kernels", "numpy", "torch", "triton")) == []


def test_engine_imports_the_standard_library_and_config_only() -> None:
    assert offenders("services/inference/engine", ("services.inference.engine", "services.inference.config")) == []


def test_only_the_edges_know_the_protos() -> None:
    users = set(importers("services", "multilora"))
    assert {user for user in users if not user.startswith(("services/cli/", "services/bench/"))} <= PROTO_USERS
    assert users >= PROTO_USERS, "the list above names files that no longer import protos"


@pytest.mark.parametrize(
    ("folder", "package"),
    [
        ("services/inference", "services.adapter_store"),
        ("services/adapter_store", "services.inference"),
        ("services/common", "services.inference"),
        ("services/common", "services.adapter_store"),
        ("services/cli", "services.inference"),
        ("services/adapter_store", "lora_kernels"),
        ("services/adapter_store", "attention_kernels"),
        ("services/inference/adapters", "services.inference.serving"),
        ("services/inference/model", "multilora"),
    ],
)
def test_never_imported(folder: str, package: str) -> None:
    assert importers(folder, package) == []


def test_only_store_commands_open_the_stores_files() -> None:
    assert importers("services/cli", "services.adapter_store") == ["services/cli/store.py"]


def test_only_the_manager_calls_the_owners_of_adapters() -> None:
    owners = {"disk_cache", "cpu_cache", "slot_pool", "packed_adapter", "store_client"}
    wiring = {
        "services/inference/server.py",
        "services/inference/engine_builder.py",
        "services/inference/model/backend.py",
        "services/inference/model/compiled_runner.py",
        "services/inference/model/gpu_runner.py",
        "services/inference/model/runner.py",
        "services/inference/model/widest_step.py",
        "services/inference/parallel/messages.py",
        "services/inference/parallel/worker.py",
        "services/inference/parallel/workers.py",
        "services/bench/engine/fewer_bits.py",
        "services/bench/engine/gpu.py",
        "services/bench/engine/steps.py",
    }
    for owner in owners:
        users = set(importers("services", f"services.inference.adapters.{owner}"))
        inside = {user for user in users if user.startswith("services/inference/adapters/")}
        assert users - inside <= wiring, f"{owner} is imported by {users - inside}"


@pytest.mark.parametrize(
    "module", ["services.adapter_store.__main__", "services.cli.main", "services.inference.server"]
)
def test_runs_without_torch(module: str) -> None:
    """Not even by way of something else: the store has no torch, and the serving face leaves it to the engine."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_peft_and_transformers_are_for_tests_only() -> None:
    """But for the program that `make bench-peers` runs in PEFT's own environment."""
    for package in ("peft", "transformers"):
        assert importers("services", package) == ["services/bench/peers/mixed_batch.py"]
        assert importers("kernels", package) == []


def test_step_fits_on_a_screen() -> None:
    tree = ast.parse((ROOT / "services/inference/engine/engine.py").read_text())
    step = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "step")
    assert step.end_lineno is not None
    assert step.end_lineno - step.lineno < 40
