"""The package's build: compiles the CPU backend for every instruction set of this architecture, into the wheel.

Without a compiler the wheel has no libraries and serves all the same: at first use they are compiled, or torch serves.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = Path(__file__).parent / "lora_kernels/cpu"


class CompileCpuBackend(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Not for an editable install: its source may change, so it compiles at first use."""
        if version == "editable":
            return
        build = _build_module()
        levels = build.LEVELS if platform.machine() in ("x86_64", "AMD64") else ["portable"]
        try:
            for level in levels:
                build.compile_library(level, build.PREBUILT / build.library_name(level))
        except (build.UnavailableError, OSError) as error:
            self.app.display_warning(f"the wheel has no compiled CPU backend: {error}")
            return
        build_data["artifacts"].append("kernels/lora_kernels/cpu/prebuilt/*.so")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        shutil.rmtree(PACKAGE / "prebuilt", ignore_errors=True)


def _build_module() -> ModuleType:
    """build.py by its path: the package around it needs torch, which a build has not."""
    spec = importlib.util.spec_from_file_location("cpu_backend_build", PACKAGE / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
