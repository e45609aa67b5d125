"""What S3 and the network do wrong: a few faults are ridden out, lasting ones become typed errors, nothing is left."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from services.adapter_store.blobs.disk import DiskBlobs
from services.adapter_store.blobs.s3 import S3Blobs
from services.adapter_store.blobs.s3_ranges import BUFFERS
from services.adapter_store.blobs.s3_removal import S3Removals
from services.adapter_store.log.s3 import S3Log
from services.adapter_store.s3 import S3Bucket
from services.adapter_store.s3_config import S3Config
from services.common.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from tests.contracts.backends import MIB, Place, left_behind, place
from tests.contracts.s3_server import Fault, FaultProxy
from tests.contracts.test_blobs import LARGE, SMALL, commit, digest_of, path_of, read_all

STREAM = "adapters/acme/x"
ALWAYS = 1000


@pytest.fixture
def here(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with place("s3", tmp_path, request, monkeypatch) as opened:
        yield opened
        assert left_behind(opened, lambda name: name.startswith(("blobs/sha256/", "log/"))) == set()


@pytest.fixture
def bucket(here: Place, fault_proxy: FaultProxy) -> S3Bucket:
    """Seen through the proxy."""
    return here.bucket(fault_proxy.server, read_timeout=2.0)


@pytest.fixture
def blobs(here: Place, bucket: S3Bucket) -> S3Blobs:
    opened = S3Blobs(bucket, DiskBlobs(here.directory / "staging"), part_bytes=5 * MIB, range_bytes=MIB)
    here._open.append(opened)
    return opened


@pytest.mark.parametrize("status", [500, 503])
@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_a_few_server_errors_are_ridden_out(
    here: Place, blobs: S3Blobs, fault_proxy: FaultProxy, status: int, data: bytes
) -> None:
    for method in ("PUT", "POST", "HEAD"):
        fault_proxy.faults.append(Fault("status", method=method, contains=here.prefix, status=status))
    digest = commit(blobs, data)
    assert here.kept() == {path_of(digest)}
    fault_proxy.faults.append(Fault("status", method="GET", contains=here.prefix, status=status, times=2))
    assert read_all(blobs, digest) == data
    assert all(fault.times == 0 or fault.method == "POST" for fault in fault_proxy.faults)


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_lasting_server_errors_are_typed_and_nothing_is_visible(
    here: Place, blobs: S3Blobs, fault_proxy: FaultProxy, data: bytes
) -> None:
    fault_proxy.faults.append(Fault("status", method="PUT", times=ALWAYS))
    with pytest.raises(Unavailable, match=r"check that the S3 server is up .*STORAGE_UNAVAILABLE") as raised:
        commit(blobs, data)
    assert raised.value.retry_after
    assert here.kept() == set()
    fault_proxy.faults.clear()
    assert read_all(blobs, commit(blobs, data)) == data


def test_a_part_that_fails_takes_the_upload_with_it(here: Place, blobs: S3Blobs, fault_proxy: FaultProxy) -> None:
    fault_proxy.faults.append(Fault("status", method="PUT", contains="partNumber=2", times=ALWAYS))
    with pytest.raises(Unavailable, match="STORAGE_UNAVAILABLE"):
        commit(blobs, LARGE)
    assert here.kept() == set()
    assert fault_proxy.count("DELETE", "uploadId=") == 1


def test_what_a_crash_left_unfinished_is_removed_when_old(here: Place, blobs: S3Blobs, fault_proxy: FaultProxy) -> None:
    fault_proxy.faults.append(Fault("status", method="PUT", contains="partNumber=", times=ALWAYS))
    fault_proxy.faults.append(Fault("status", method="DELETE", times=ALWAYS))
    with pytest.raises(Unavailable, match="STORAGE_UNAVAILABLE"):
        commit(blobs, LARGE)
    fault_proxy.faults.clear()
    assert here.kept() == {f"unfinished {here.prefix}/{path_of(digest_of(LARGE))}"}
    assert blobs.remove_unfinished() == 0
    assert blobs.remove_unfinished(0) == 1


@pytest.mark.parametrize(("method", "contains"), [("PUT", "blobs/"), ("POST", "uploads"), ("POST", "uploadId=")])
def test_a_lost_answer_to_an_upload_changes_nothing(
    here: Place, blobs: S3Blobs, fault_proxy: FaultProxy, method: str, contains: str
) -> None:
    data = SMALL if method == "PUT" else LARGE
    fault_proxy.faults.append(Fault("lose_answer", method=method, contains=contains))
    digest = commit(blobs, data)
    assert fault_proxy.faults[0].times == 0
    assert read_all(blobs, digest) == data
    if contains == "uploads":  # one was begun that nobody knows of
        assert blobs.remove_unfinished(0) == 1
    assert here.kept() == {path_of(digest)}


@pytest.mark.parametrize("action", ["cut", "stall"])
def test_a_broken_download_is_resumed_where_it_broke(blobs: S3Blobs, fault_proxy: FaultProxy, action: str) -> None:
    digest = commit(blobs, LARGE)
    fault_proxy.faults.append(Fault(action, method="GET", after=300_000))  # type: ignore[arg-type]
    fault_proxy.ranges.clear()
    assert read_all(blobs, digest) == LARGE
    first, *_ = fault_proxy.ranges
    start, stop = (int(each) for each in first.removeprefix("bytes=").split("-"))
    resumed = [asked for asked in fault_proxy.ranges if asked.endswith(f"-{stop}") and asked != first]
    assert len(resumed) == 1
    assert start < int(resumed[0].removeprefix("bytes=").split("-")[0]) <= start + 300_000


def test_a_download_that_always_breaks_ends(blobs: S3Blobs, fault_proxy: FaultProxy) -> None:
    digest = commit(blobs, SMALL)
    fault_proxy.faults.append(Fault("cut", method="GET", after=10, times=ALWAYS))
    with closing(blobs.open(digest)) as reader, pytest.raises(Unavailable, match="STORAGE_UNAVAILABLE"):
        reader.read(0, MIB)
    fault_proxy.faults.clear()
    with closing(blobs.open(digest)) as reader:  # the failed range is not kept
        assert reader.read(0, MIB) == SMALL


def test_a_blob_removed_while_it_is_read(here: Place, blobs: S3Blobs) -> None:
    digest = commit(blobs, LARGE)
    with closing(blobs.open(digest)) as reader:
        reader.read(0, 10)
        here.bucket().delete(path_of(digest))
        with pytest.raises(NotFound, match="BLOB_NOT_FOUND"):
            reader.read(len(LARGE) - 10, 10)


def test_other_bytes_under_the_name_are_noticed(here: Place, blobs: S3Blobs) -> None:
    bucket = here.bucket()
    bucket.create(path_of(digest_of(SMALL)), SMALL[:-1] + b"!")
    with pytest.raises(DataLoss, match="BLOB_CORRUPT"):
        commit(blobs, SMALL)


def test_64_readers_share_a_bounded_number_of_buffers(blobs: S3Blobs) -> None:
    digest = commit(blobs, LARGE)
    pool = blobs.ranges
    together = threading.Barrier(64)

    def read(number: int) -> bool:
        with closing(blobs.open(digest)) as reader:
            together.wait(timeout=60)
            offset, good = 0, True
            while piece := reader.read(offset, 300_000):
                good &= piece == LARGE[offset : offset + len(piece)]
                offset += len(piece)
                if number % 8 == 0:
                    time.sleep(0.005)  # some are slow, and hold what they have
            return good and offset == len(LARGE)

    with ThreadPoolExecutor(64) as threads:
        assert all(threads.map(read, range(64)))
    assert 0 < pool.most_held <= BUFFERS
    for _ in range(100):
        if pool.held == 0:
            break
        time.sleep(0.05)
    assert pool.held == 0


def test_a_reader_that_finds_no_buffer_goes_on_without(blobs: S3Blobs) -> None:
    digest = commit(blobs, LARGE)
    hogs = [blobs.open(digest) for _ in range(BUFFERS + 2)]
    try:
        for number, hog in enumerate(hogs):  # far apart, so that they share nothing
            offset = (number % 13) * MIB
            assert hog.read(offset, 10) == LARGE[offset : offset + 10]
        assert blobs.ranges.held == blobs.ranges.most_held == BUFFERS
        assert read_all(blobs, digest, length=500_000) == LARGE
        assert blobs.ranges.most_held == BUFFERS
    finally:
        for hog in hogs:
            hog.close()


@pytest.mark.parametrize("action", ["status", "lose_answer"])
def test_an_entry_whose_answer_was_lost_is_known_as_ones_own(
    bucket: S3Bucket, fault_proxy: FaultProxy, action: str
) -> None:
    log = S3Log(bucket)
    fault_proxy.faults.append(Fault(action, method="PUT", contains="/log/"))  # type: ignore[arg-type]
    assert log.append(STREAM, 1, b"mine")
    fault_proxy.faults.append(Fault(action, method="PUT", contains="/log/"))  # type: ignore[arg-type]
    assert not log.append(STREAM, 1, b"mine")


def test_an_entry_of_which_every_answer_is_lost_is_read_back(bucket: S3Bucket, fault_proxy: FaultProxy) -> None:
    log = S3Log(bucket)
    fault_proxy.faults.append(Fault("lose_answer", method="PUT", times=ALWAYS))
    assert log.append(STREAM, 1, b"mine")
    assert not log.append(STREAM, 1, b"mine")


def test_a_log_that_is_away_is_told(bucket: S3Bucket, fault_proxy: FaultProxy) -> None:
    log = S3Log(bucket)
    fault_proxy.faults.append(Fault("status", times=ALWAYS))
    for call in (lambda: log.append(STREAM, 1, b"x"), lambda: log.read(STREAM, 1), lambda: list(log.streams())):
        with pytest.raises(Unavailable, match="STORAGE_UNAVAILABLE"):
            call()
    fault_proxy.faults.clear()
    assert log.append(STREAM, 1, b"x")
    fault_proxy.faults.append(Fault("cut", method="GET", after=0, times=2))
    assert log.read(STREAM, 1) == b"x"


def test_nobody_listens(here: Place) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        bucket = S3Bucket(
            S3Config("b", "", f"http://127.0.0.1:{unused.getsockname()[1]}", "us-east-1", attempts=2, connect_timeout=1)
        )
        here._open.append(bucket)
        with pytest.raises(Unavailable, match="STORAGE_UNAVAILABLE"):
            bucket.check()


def test_a_removal_that_died_is_waited_for_and_then_taken_over(
    here: Place, blobs: S3Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.adapter_store.blobs.s3_removal.WAIT_SECONDS", 0.5)
    digest = commit(blobs, SMALL)
    removals: S3Removals = blobs._removals
    removals._announce(f"removing/{digest.removeprefix('sha256:')}")
    with pytest.raises(Unavailable, match="BLOB_BEING_REMOVED"):
        commit(blobs, SMALL)
    assert not blobs.delete(digest, before_ns=time.time_ns() + 10**11)
    removals.stale_seconds = 0
    here.tick()
    assert commit(blobs, SMALL) == digest
    assert here.kept() == {path_of(digest)}


def test_start_checks_the_bucket(here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = here.bucket()
    bucket.check()
    assert here.kept() == set()
    with pytest.raises(FailedPrecondition, match="STORAGE_BUCKET_NOT_FOUND"):
        here._opened(S3Bucket(S3Config("no-such-bucket", "", bucket.config.endpoint_url, "us-east-1"))).check()
    monkeypatch.setattr(bucket, "create", lambda *_: True)  # as by a server that knows no conditions
    with pytest.raises(FailedPrecondition, match="STORAGE_NOT_CONDITIONAL"):
        bucket.check()
    for name, secret in {"test": "wrong", "nobody": "x", "reader": "readersecret"}.items():
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", name)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        with pytest.raises(FailedPrecondition, match=r"AWS_ACCESS_KEY_ID.*STORAGE_ACCESS_DENIED"):
            here.bucket().check()


@pytest.mark.parametrize("uri", ["s3:/bucket", "http://bucket", "s3://", "s3://UPPER/x", "s3://bucket/a//b", "bucket"])
def test_a_wrong_uri_is_refused(uri: str) -> None:
    with pytest.raises(InvalidArgument, match="INVALID_S3_URI"):
        S3Config.parse(uri)


def test_uris() -> None:
    assert S3Config.parse("s3://bucket/a/b/") == S3Config("bucket", "a/b")
    assert S3Config.parse("s3://my.bucket").uri == "s3://my.bucket"
