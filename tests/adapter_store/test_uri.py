"""RegisterFromUri reads beneath its roots and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.common.errors import FailedPrecondition, InvalidArgument, MultiloraError, NotFound, PermissionDenied
from tests.adapter_store.conftest import Client, RunningStore
from tests.adapter_store.uploads import BASE_MODEL, CONFIG_FILE, WEIGHTS_FILE, make_adapter

HEADER = {"adapter": "x", "base_model": BASE_MODEL}


def register(client: Client, uri: str) -> int:
    return client("RegisterFromUri", header=HEADER, uri=uri).version.identity.version


def refusal(running: RunningStore, uri: str) -> MultiloraError:
    with pytest.raises(MultiloraError) as caught:
        register(running.client, uri)
    assert running.blob_files() == set()
    return caught.value


def test_a_directory_beneath_a_root_is_read(running: RunningStore, uri_root: Path) -> None:
    client = running.client
    directory = make_adapter().save(uri_root / "some dir" / "x")
    (directory / "README.md").write_text("not read")
    assert register(client, directory.as_uri()) == 1
    uploaded = client.register("x", make_adapter())
    assert (uploaded.existed, uploaded.version.identity.version) == (True, 1)
    assert register(client, f"file://localhost{directory.parent}/../some%20dir/x") == 1


def test_links_inside_the_root_are_followed(client: Client, uri_root: Path) -> None:
    """As in a Hugging Face cache, whose snapshots link to its blobs."""
    saved = make_adapter().save(uri_root / "blobs")
    (uri_root / "snapshot").mkdir()
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        (uri_root / "snapshot" / file).symlink_to(saved / file)
    (uri_root / "link").symlink_to(uri_root / "snapshot")
    assert register(client, (uri_root / "link").as_uri()) == 1


def test_paths_outside_the_roots_are_refused(running: RunningStore, uri_root: Path, tmp_path: Path) -> None:
    outside = make_adapter().save(tmp_path / "outside")
    (uri_root / "link").symlink_to(outside)
    beside = make_adapter().save(tmp_path / "root-beside")
    half = uri_root / "half"
    half.mkdir()
    (half / CONFIG_FILE).write_bytes((outside / CONFIG_FILE).read_bytes())
    (half / WEIGHTS_FILE).symlink_to(outside / WEIGHTS_FILE)
    for uri in (
        outside.as_uri(),
        beside.as_uri(),
        f"file://{uri_root}/../outside",
        f"file://{uri_root}/%2e%2e/outside",
        (uri_root / "link").as_uri(),
        half.as_uri(),
        "file:///etc",
        "file:///",
        "file:///no/such/place",
        f"file://{uri_root}/../no-such-place",
        "s3://bucket/key",
    ):
        error = refusal(running, uri)
        assert (type(error), error.reason) == (PermissionDenied, "PATH_OUTSIDE_ROOTS"), uri


def test_what_is_not_there_is_told_inside_the_roots(running: RunningStore, uri_root: Path) -> None:
    (uri_root / "loop").symlink_to(uri_root / "loop")
    for name in ("missing", "loop"):
        error = refusal(running, f"file://{uri_root}/{name}")
        assert (type(error), error.reason) == (NotFound, "PATH_NOT_FOUND")


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "/tmp",
        "relative",
        "file:relative",
        "file://host/tmp",
        "http://169.254.169.254/latest/meta-data",
        "S3://bucket/key",
        "file:///tmp?x=1",
        "file:///tmp#x",
        "file:///tmp%00",
        "file://[::1",
    ],
)
def test_other_uris_are_invalid(running: RunningStore, uri: str) -> None:
    error = refusal(running, uri)
    assert (type(error), error.reason) == (InvalidArgument, "INVALID_URI")


def test_a_file_is_no_directory(running: RunningStore, uri_root: Path) -> None:
    (uri_root / "file").write_bytes(b"")
    assert refusal(running, f"file://{uri_root}/file").reason == "INVALID_URI"


def test_a_pipe_is_not_waited_for(running: RunningStore, uri_root: Path) -> None:
    os.mkfifo(uri_root / CONFIG_FILE)
    make_adapter().files()
    (uri_root / WEIGHTS_FILE).write_bytes(b"")
    assert refusal(running, uri_root.as_uri()).reason == "INVALID_URI"


def test_incomplete_and_pickled_directories_are_refused(running: RunningStore, uri_root: Path) -> None:
    directory = make_adapter().save(uri_root / "x")
    (directory / WEIGHTS_FILE).rename(directory / "adapter_model.bin")
    assert refusal(running, directory.as_uri()).reason == "UNSAFE_FORMAT"
    (directory / "adapter_model.bin").unlink()
    assert refusal(running, directory.as_uri()).reason == "MISSING_FILE"
    (directory / WEIGHTS_FILE).write_bytes(b"")
    assert refusal(running, directory.as_uri()).reason == "INVALID_SAFETENSORS"


def test_without_roots_the_flag_is_told(shared: RunningStore) -> None:
    with pytest.raises(FailedPrecondition, match="--uri-root") as caught:
        register(shared.client, "file:///tmp")
    assert caught.value.reason == "NO_URI_ROOTS"
