"""The Triton path in Triton's interpreter, for machines without a GPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import lora_kernels

TRITON_MODULES = ("lora_kernels.triton_shrink", "lora_kernels.triton_expand", "lora_kernels.triton_path")


@pytest.fixture(scope="package")
def triton_path() -> Iterator[ModuleType]:
    """`lora_kernels.triton_path` as the interpreter runs it, a copy that nothing else in this process imports.

    A kernel is interpreted or compiled for good at the moment it is decorated: so the switch is on for one fresh
    import, and then the modules are taken away again, for whoever imports the real ones. Triton itself is imported
    before: it loads more of itself later and insists on one mode. The kernels call none of its own jitted functions.
    """
    importlib.import_module("triton.language")
    imported = {name: sys.modules.pop(name) for name in TRITON_MODULES if name in sys.modules}
    attributes = {name: vars(lora_kernels).pop(name, None) for name in map(_last_part, TRITON_MODULES)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        interpreted = importlib.import_module("lora_kernels.triton_path")
    for name in TRITON_MODULES:
        del sys.modules[name]
        delattr(lora_kernels, _last_part(name))
    sys.modules.update(imported)
    vars(lora_kernels).update({name: module for name, module in attributes.items() if module is not None})
    with pytest.MonkeyPatch.context() as patch:
        _widen_bf16_in_dot(patch)
        yield interpreted


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def _widen_bf16_in_dot(patch: pytest.MonkeyPatch) -> None:
    """Mend the interpreter's `tl.dot`: it keeps bf16 as 16-bit integers and multiplies those."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    dot = InterpreterBuilder.create_dot
    patch.setattr(InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest))
