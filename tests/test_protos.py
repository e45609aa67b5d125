"""The generated code beside the protos is what the protos say."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "protos"
sys.path.insert(0, str(ROOT))

from generate import generate  # noqa: E402  (a script beside the protos, not a package)


def test_generated_code_is_current(tmp_path: Path) -> None:
    generate(tmp_path)
    fresh = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*_pb2*.py*")}
    kept = {path.relative_to(ROOT): path.read_bytes() for path in ROOT.rglob("*_pb2*.py*") if path.suffix != ".pyc"}
    assert fresh.keys() == kept.keys(), "run `make protos`"
    stale = [str(path) for path in fresh if fresh[path] != kept[path]]
    assert not stale, f"run `make protos`: {stale}"
