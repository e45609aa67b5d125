"""A process killed at every commit step of blobs and log on S3: nothing is half there, and the next one goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.adapter_store.blobs.s3 import S3Blobs
from services.adapter_store.steps import KILL_AT
from tests.contracts.backends import Place, place
from tests.contracts.test_blobs import LARGE, SMALL, commit, digest_of, path_of, read_all

ROOT = Path(__file__).parents[2]
STREAM = "adapters/acme/x"
ACTIONS = {"small": SMALL, "large": LARGE, "renew": SMALL, "remove": SMALL, "append": b"entry"}
STEPS = {
    "blobs.s3.put": "small",
    "blobs.s3.begun": "large",
    "blobs.s3.sent": "large",
    "blobs.s3.completed": "large",
    "blobs.s3.renewed": "renew",
    "blobs.s3.announced": "remove",
    "blobs.s3.removed": "remove",
    "log.s3.created": "append",
}
VICTIM = """
import sys, time
from pathlib import Path
from tests.contracts.backends import Place
from tests.contracts.s3_server import S3Server
from tests.contracts.test_blobs import commit, digest_of
from tests.contracts.test_s3_kill import ACTIONS, STREAM
action, directory, endpoint, prefix = sys.argv[1:]
place = Place("s3", Path(directory), S3Server(endpoint), prefix)
if action == "append":
    place.log().append(STREAM, 1, ACTIONS[action])
elif action == "remove":
    place.blobs().delete(digest_of(ACTIONS[action]), before_ns=time.time_ns())
else:
    commit(place.blobs(), ACTIONS[action])
"""


@pytest.fixture
def here(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with place("s3", tmp_path, request, monkeypatch) as opened:
        yield opened


def test_every_step_is_killed_at() -> None:
    sources = [path.read_text() for path in (ROOT / "services/adapter_store").rglob("s3*.py")]
    assert {step for source in sources for step in re.findall(r'commit_step\("([^"]+)"\)', source)} == set(STEPS)


@pytest.mark.parametrize("step", STEPS)
def test_killed_at(step: str, here: Place, tmp_path: Path) -> None:
    action = STEPS[step]
    data = ACTIONS[action]
    mine = here.blobs()
    assert isinstance(mine, S3Blobs)
    if action in ("renew", "remove"):
        commit(mine, data)
        here.tick()
    assert here.server is not None
    directory = tmp_path / "victim"
    directory.mkdir()
    victim = subprocess.run(
        [sys.executable, "-c", VICTIM, action, str(directory), here.server.endpoint_url, here.prefix],
        cwd=ROOT,
        env=os.environ | {KILL_AT: step},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert victim.returncode == -signal.SIGKILL, victim.stderr

    if action == "append":
        assert here.log().read(STREAM, 1) == data
        assert not here.log().append(STREAM, 1, data)
        return
    for blob in mine.list():  # whatever shows is whole
        assert read_all(mine, blob.digest) == data
    mine._removals.stale_seconds = 0  # of the 46 s for which a dead removal is waited
    here.tick()
    began = time.time_ns()
    assert commit(mine, data) == digest_of(data)
    assert not mine.delete(digest_of(data), before_ns=began)
    assert read_all(mine, digest_of(data)) == data
    mine.remove_unfinished(0)
    assert {name for name in here.kept() if not name.startswith("staging-")} == {path_of(digest_of(data))}
