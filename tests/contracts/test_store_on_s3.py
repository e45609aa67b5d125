"""The store's process with blobs and log on S3 and its index in SQLite: truth is in the bucket, and only there."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.adapter_store.__main__ import main, parse_arguments
from services.adapter_store.backends import INDEX_FILE, open_place
from services.common.errors import InvalidArgument
from tests.adapter_store.conftest import Client
from tests.adapter_store.uploads import make_adapter
from tests.conftest import run_store
from tests.contracts.s3_server import S3Server


@pytest.fixture
def flags(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    prefix = f"store-{secrets.token_hex(8)}"
    yield [
        f"--blobs=s3://{s3_server.bucket}/{prefix}",
        f"--s3-endpoint-url={s3_server.endpoint_url}",
        f"--s3-region={s3_server.region}",
    ]
    kinds = {key.removeprefix(f"{prefix}/").split("/")[0] for key in s3_server.keys(f"{prefix}/")}
    assert kinds <= {"blobs", "log"}
    assert s3_server.unfinished_uploads(f"{prefix}/") == set()


def test_the_index_is_rebuilt_from_the_bucket(flags: list[str], tmp_path: Path) -> None:
    with run_store(tmp_path / "data", *flags) as store:
        client = Client(store.address)
        client.register_base_model()
        identity = client.register("acme/x", make_adapter()).version.identity
        client.register("acme/x", make_adapter(seed=1))
        client("SetAlias", adapter="acme/x", alias="canary", targets=[{"version": 2}])
        data = client.pull(identity.pack_digest)
        assert client.pull(identity.pack_digest, 100) == data[100:]
        client.channel.close()
    for left in (tmp_path / "data").glob(f"{INDEX_FILE}*"):
        left.unlink()
    kept = {path.name for path in (tmp_path / "data").rglob("*") if path.is_file()}
    assert kept <= {"lock", "sweep.lock"}  # nothing but the bucket remembers

    with run_store(tmp_path / "data", *flags) as store:
        client = Client(store.address)
        assert client.resolve("acme/x").identity == identity
        assert client.resolve("acme/x:canary").identity.version == 2
        assert client.pull(identity.pack_digest) == data
        assert client.register("acme/x", make_adapter()).existed
        assert list(client("VerifyIntegrity").problems) == []
        client.channel.close()


def test_what_keeps_a_store_from_starting_is_told(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ["--port", "0", "--data-dir", str(tmp_path / "data")]
    assert main([*where, "--blobs=s3://no-such-bucket", *flags[1:]]) == 1
    assert "STORAGE_BUCKET_NOT_FOUND" in capsys.readouterr().err
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert main([*where, *flags]) == 1
    assert "STORAGE_ACCESS_DENIED" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        ["--blobs=s3:/x"],
        ["--blobs=s3://X"],
        ["--blobs=s3://bucket", "--s3-endpoint-url=localhost:8333"],
        ["--blobs=s3://bucket", "--s3-addressing=else"],
        ["--s3-endpoint-url=http://localhost:8333"],
        ["--s3-region=us-east-1"],
    ],
)
def test_wrong_flags_are_refused(wrong: list[str], tmp_path: Path) -> None:
    def start() -> None:
        open_place(parse_arguments(["--data-dir", str(tmp_path), *wrong]).blobs_place, staging=tmp_path)

    with pytest.raises(InvalidArgument):
        start()
