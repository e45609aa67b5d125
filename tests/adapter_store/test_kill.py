"""A store process killed at every commit step of every change: nothing is half there, and no number is given twice.

The steps are read from the source, so that a new one without a case here fails. At the steps of the backends on S3,
contracts/test_s3_kill.py kills.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.adapter_store.log.fold import AdapterState
from services.adapter_store.steps import KILL_AT
from services.adapter_store.store import AdapterStore
from services.common.errors import NotFound
from services.common.profile import profile_from_config
from services.common.split import Target
from tests.adapter_store import uploads
from tests.adapter_store.conftest import TIMEOUT_SECONDS
from tests.adapter_store.killed import NAME, OPERATIONS, SPLIT, open_store, open_target, register
from tests.contracts import test_s3_kill
from tests.contracts.redis_server import RedisServer
from tests.contracts.s3_server import S3Server

ROOT = Path(__file__).parents[2]
APPEND = ("journal.appended", "journal.applied")
ON_DISK = ("log.disk.staged", "log.disk.linked")
SQLITE = ("index.sqlite.written",)
PASSED = {
    "register": ("register.config", "register.weights", "register.pack", *APPEND),
    "alias": APPEND,
    "delete": APPEND,
    "collect": ("collect.given_up", "collect.swept", *APPEND),
    "reindex": ("index.sqlite.rebuilt",),
    "copy": ("copy.blob", "copy.entry"),
}
OF_BACKENDS = {
    "register": ("blobs.disk.synced", "blobs.disk.linked", *ON_DISK, *SQLITE),
    "alias": (*ON_DISK, *SQLITE),
    "delete": (*ON_DISK, *SQLITE),
    "collect": (*ON_DISK, *SQLITE),
    "reindex": (),
    "copy": ("blobs.disk.synced", "blobs.disk.linked", *ON_DISK, *SQLITE),
}
CASES = [("disk", operation, step) for operation in PASSED for step in PASSED[operation] + OF_BACKENDS[operation]]
CASES += [("s3", operation, step) for operation in PASSED for step in (*PASSED[operation], *SQLITE)]
CASES = [case for case in CASES if case != ("s3", "reindex", "index.sqlite.written")]
# Blobs and log on disk, index in Redis: the steps around the index once more.
CASES += [
    ("redis", operation, step.replace("sqlite", "redis"))
    for backend, operation, step in CASES
    if backend == "disk" and step.startswith(("journal.", "index.", "copy.entry"))
]

Places = dict[str, str]


def steps_in_the_source() -> Iterator[str]:
    for path in (ROOT / "services").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "commit_step":
                (name,) = node.args
                assert isinstance(name, ast.Constant), f"{path}: a step's name is a literal"
                yield name.value


def test_every_step_has_a_name_of_its_own_and_a_case() -> None:
    steps = list(steps_in_the_source())
    assert len(steps) == len(set(steps))
    assert set(PASSED) == set(OPERATIONS)
    assert set(steps) == {step for _, _, step in CASES} | set(test_s3_kill.STEPS)


@pytest.fixture
def places(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """A store with versions 1 and 2 of acme/x, and 3, of another content, deleted; stable is 1."""
    data = tmp_path / "data"
    where = {"blobs": str(data), "endpoint_url": "", "staging": str(data), "index": str(data / "index.sqlite3")}
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3_server")
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        where["blobs"] = f"s3://{server.bucket}/kill-{secrets.token_hex(8)}"
        where["endpoint_url"] = server.endpoint_url
        monkeypatch.setenv("AWS_REGION", server.region)
    if request.param == "redis":
        redis: RedisServer = request.getfixturevalue("redis_server")
        where["index"], where["prefix"] = redis.url(), f"kill-{secrets.token_hex(8)}"
    where["target"] = str(tmp_path / "target")
    store = open_store(where)
    config = json.dumps(uploads.MODEL_CONFIG)
    store.changes.register_base_model(profile_from_config(uploads.BASE_MODEL, config, max_lora_rank=8))
    for seed in range(3):
        register(store, seed)
    store.changes.delete_version(NAME, 3)
    store.close()
    return where


@pytest.mark.parametrize(("places", "operation", "step"), CASES, indirect=["places"])
def test_killed_at(places: Places, operation: str, step: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.adapter_store.killed", operation, json.dumps(places)],
        cwd=ROOT,
        env=os.environ | {KILL_AT: step},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    store = open_store(places)
    store.heal()
    assert store.verify().problems == []
    before = store.journal.index.position()
    store.heal()
    assert store.journal.index.position() == before  # healed once, healed
    assert all_or_nothing(store, operation)
    with contextlib.suppress(NotFound):  # what is deleted is not deleted twice
        OPERATIONS[operation](store, places)  # once more, by whoever did not get an answer
    assert done_and_well(store, operation, places)
    number = register(store, 9).version.number
    assert number == (5 if operation == "register" else 4)
    assert store.verify().problems == []
    assert store.journal.rebuild() > 0
    assert store.verify().problems == []
    store.close()


def state_of(store: AdapterStore) -> AdapterState:
    state = store.journal.catch_up(f"adapters/{NAME}").state
    assert isinstance(state, AdapterState)
    return state


def all_or_nothing(store: AdapterStore, operation: str) -> bool:
    state = state_of(store)
    match operation:
        case "register":  # the version and its promotion are one
            assert (len(state.versions), state.aliases["stable"]) in [(3, (Target(1),)), (4, (Target(4),))]
        case "alias":
            assert state.aliases["stable"] in [(Target(1),), SPLIT]
        case "delete":
            assert state.live in ([1, 2], [1])
        case _:
            assert (len(state.versions), state.live, state.aliases) == (3, [1, 2], {"stable": (Target(1),)})
    return True


def done_and_well(store: AdapterStore, operation: str, places: Places) -> bool:
    state = state_of(store)
    match operation:
        case "register":
            assert (state.live, state.aliases["stable"]) == ([1, 2, 4], (Target(4),))
        case "alias":
            assert state.aliases["stable"] == SPLIT
        case "delete":
            assert state.live == [1]
        case "collect":
            assert [version.collected for version in state.versions] == [False, False, True]
            assert len(list(store.blobs.list())) == 4  # one config, one header of weights, and a pack of each
        case "copy":
            target = open_target(places)
            assert target.verify().problems == []
            assert state_of(target) == state
            assert target.journal.check() == []
            target.close()
    return True
