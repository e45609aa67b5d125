"""Regenerate the Python code beside the .proto files: `python protos/generate.py [--out DIR]`.

The generated code is checked in, so that no build needs a compiler; a test regenerates and compares.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent


def generate(out: Path) -> None:
    """Write *_pb2.py, *_pb2.pyi, *_pb2_grpc.py and *_pb2_grpc.pyi for every proto beneath `out`."""
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    protos = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.proto"))
    scripts = Path(sys.executable).parent
    plugins = [f"--plugin=protoc-gen-{name}={scripts / f'protoc-gen-{name}'}" for name in ("mypy", "mypy_grpc")]
    flags = [*plugins, *(f"--{kind}_out=quiet:{out}" for kind in ("mypy", "mypy_grpc"))]
    flags += [f"--{kind}_out={out}" for kind in ("python", "grpc_python")]
    if protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", *flags, *protos]):
        sys.exit("protoc failed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT)
    generate(parser.parse_args().out)
