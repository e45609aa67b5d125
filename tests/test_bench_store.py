"""The store's benchmark runs, and says what it must: no times are tested, as machines differ."""

from __future__ import annotations

import json

import pytest

from services.bench.store import Sizes, run

TINY = Sizes(
    megabytes=3,
    rounds=1,
    s3_rounds=1,
    pulls=2,
    pulled_megabytes=3,
    adapters=20,
    rate=50,
    seconds=0.2,
    call_rounds=1,
    starts=1,
    watchers=2,
    moves=2,
)


@pytest.mark.timeout(120)
def test_every_benchmark_runs_and_reports() -> None:
    lines = [json.loads(result.to_json()) for result in run(TINY)]
    measured = [(line["setup"]["benchmark"], line["setup"].get("backend") or line["setup"]["index"]) for line in lines]
    assert measured == [
        *(("register", "disk"), ("pull", "disk"), ("register", "S3"), ("pull", "S3")),
        *(("pull_memory", "disk"), ("pull_memory", "S3")),
        *((name, index) for name in ("start", "resolve", "list", "watch") for index in ("SQLite", "Redis")),
    ]
    for line in lines:
        assert line.keys() == {"setup", "versions", "device", "metrics"}
        assert line["versions"].keys() >= {"python", "multilora", "grpcio"}
        assert line["device"]["cores"] >= 1
        for target in line["metrics"]["targets"].values():
            assert target.keys() == {"value", "target", "passed"}
            assert isinstance(target["passed"], bool)
    register = lines[0]["metrics"]
    assert register["ratio"].keys() == register["store_seconds"].keys() == {"median", "low", "high"}
    aimed = [line["setup"]["benchmark"] for line in lines if line["metrics"]["targets"]]
    assert len(aimed) == len(lines) - 1, "all but registering on S3 have a target"
