"""The benchmark of streaming runs, loses no token and says what it says it does."""

from __future__ import annotations

import json
from pathlib import Path

from services.bench.streaming import compare


def test_both_servers_stream_every_token(tiny_model: Path) -> None:
    face, bare = (json.loads(result.to_json()) for result in compare(tiny_model, 4, 20, 1, 0.0))
    assert (face["setup"]["server"], bare["setup"]["server"]) == ("face", "bare")
    assert bare["metrics"]["tokens_per_chunk"] == 1
    assert len(face["metrics"]["targets"]) == 2
