"""The Triton path in Triton's interpreter, for machines without a GPU."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import attention_kernels
import lora_kernels

LORA_KERNELS = ("shrink", "expand", "work_list", "pool", "linear", "path", "embed", "fused")


@pytest.fixture(scope="package")
def interpreted() -> Iterator[dict[str, ModuleType]]:
    """`lora_kernels.triton_*` as the interpreter runs them."""
    with _interpreted(lora_kernels, *LORA_KERNELS) as copies:
        yield copies


@pytest.fixture(scope="package")
def triton_path(interpreted: dict[str, ModuleType]) -> ModuleType:
    return interpreted["triton_path"]


@pytest.fixture(scope="package")
def attention_path() -> Iterator[ModuleType]:
    """`attention_kernels.triton_path` as the interpreter runs it."""
    with _interpreted(attention_kernels, "attention", "path") as copies:
        yield copies["triton_path"]


@contextlib.contextmanager
def _interpreted(package: ModuleType, *parts: str) -> Iterator[dict[str, ModuleType]]:
    """Modules `triton_*` of a package, copies that nothing else in this process imports.

    A kernel is interpreted or compiled for good at the moment it is decorated: so the switch is on for one fresh
    import, and then the modules are taken away again, for whoever imports the real ones. Triton itself is imported
    before: it loads more of itself later and insists on one mode. The kernels call none of its own jitted functions.
    """
    importlib.import_module("triton.language")
    names = [f"{package.__name__}.triton_{part}" for part in parts]
    imported = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    attributes = {name: vars(package).pop(name, None) for name in map(_last_part, names)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        copies = {_last_part(name): importlib.import_module(name) for name in names}
    for name in names:
        del sys.modules[name]
        delattr(package, _last_part(name))
    sys.modules.update(imported)
    vars(package).update({name: module for name, module in attributes.items() if module is not None})
    with pytest.MonkeyPatch.context() as patch:
        _mend_dot(patch)
        _mend_bfloat16(patch)
        yield copies


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def _mend_dot(patch: pytest.MonkeyPatch) -> None:
    """The interpreter's `tl.dot`, which keeps bf16 as 16-bit integers and multiplies those, and whose BLAS adds a row's
    products in an order that depends, on some processors, on the row's place in the tile. A tensor core's does not."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def wide(handle: Any) -> np.ndarray[Any, Any]:
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data.astype(np.float32)

    def dot(_builder: Any, a: Any, b: Any, c: Any, *_rest: Any) -> Any:
        product = np.zeros(c.data.shape, np.float32)
        for column, row in zip(wide(a).T, wide(b), strict=True):
            product += column[:, None] * row
        return TensorHandle((product + c.data).astype(c.data.dtype), c.dtype.scalar)

    patch.setattr(InterpreterBuilder, "create_dot", dot)


def _mend_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts float32 off to bf16, where a GPU rounds to the nearest."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def rounding(original: Any) -> Any:
        def cast(builder: Any, source: Any, dtype: Any, *mode: Any) -> Any:
            if dtype.scalar != tl.bfloat16:
                return original(builder, source, dtype, *mode)
            wide = source.data.astype(np.float32).view(np.uint32)
            nearest = (wide + 0x7FFF + (wide >> 16 & 1)) >> 16
            return TensorHandle(np.where(np.isnan(source.data), 0x7FC0, nearest).astype(np.uint16), tl.bfloat16)

        return cast

    for name in ("create_fp_trunc", "create_fp_to_fp"):  # the second is how fp16 becomes bf16
        patch.setattr(InterpreterBuilder, name, rounding(getattr(InterpreterBuilder, name)))
