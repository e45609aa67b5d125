"""RegisterFromUri from a real S3 server: beneath its roots and nowhere else, whole or not at all."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from services.adapter_store.__main__ import main, parse_arguments
from services.adapter_store.blobs import s3_ranges
from services.adapter_store.s3 import S3Bucket
from services.adapter_store.s3_config import S3Config
from services.adapter_store.uri_s3 import MAX_KEY_BYTES
from services.common.errors import (
    FailedPrecondition,
    InvalidArgument,
    MultiloraError,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from tests.adapter_store.conftest import MAX_UPLOAD_BYTES, Client, RunningStore
from tests.adapter_store.uploads import BASE_MODEL, CONFIG_FILE, WEIGHTS_FILE, Adapter, make_adapter
from tests.conftest import ROOT, run_store
from tests.contracts.s3_server import Fault, FaultProxy, S3Server

ALWAYS = 1000
RANGE_BYTES = 1000  # an adapter is 6 KB here, and so several ranges


@dataclass
class Source:
    """A bucket with a prefix that is a store's root, and what lies in it."""

    server: S3Server
    prefix: str

    @property
    def uri(self) -> str:
        return f"s3://{self.server.bucket}/{self.prefix}"

    def bucket(self, **settings: Any) -> S3Bucket:
        settings = {"attempts": 3, "read_timeout": 2.0} | settings
        return S3Bucket(
            S3Config(self.server.bucket, self.prefix, self.server.endpoint_url, self.server.region, **settings)
        )

    def put(self, key: str, data: bytes) -> None:
        self.server.client().put_object(Bucket=self.server.bucket, Key=f"{self.prefix}/{key}", Body=data)

    def save(self, directory: str, adapter: Adapter) -> Adapter:
        for file, data in adapter.files().items():
            self.put(f"{directory}/{file}", data)
        return adapter


@pytest.fixture
def source(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Source:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return Source(s3_server, f"import-{secrets.token_hex(8)}")


@pytest.fixture
def through_proxy(source: Source, fault_proxy: FaultProxy) -> Source:
    return Source(fault_proxy.server, source.prefix)


@pytest.fixture
def running(tmp_path: Path, through_proxy: Source, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningStore]:
    """A store on disk whose only root is the prefix, seen through the proxy."""
    monkeypatch.setattr("services.adapter_store.uri_s3.RANGE_BYTES", RANGE_BYTES)
    store = RunningStore(tmp_path / "data", (through_proxy.bucket(),))
    store.client.register_base_model()
    yield store
    store.close()


def register(client: Client, uri: str, name: str = "x") -> Any:
    return client("RegisterFromUri", header={"adapter": name, "base_model": BASE_MODEL}, uri=uri)


def refusal(running: RunningStore, uri: str) -> MultiloraError:
    """The error; that nothing of a refused adapter is kept is part of it."""
    with pytest.raises(MultiloraError) as caught:
        register(running.client, uri)
    assert running.blob_files() == set()
    assert list(running.client("ListAdapters").adapters) == []
    return caught.value


def test_through_the_process(source: Source, tmp_path: Path) -> None:
    adapter = source.save("some dir/ä+1", make_adapter())
    flags = (f"--s3-endpoint-url={source.server.endpoint_url}", f"--s3-region={source.server.region}")
    files = tmp_path / "files"
    other = make_adapter(seed=1).save(files / "other")
    with run_store(tmp_path / "data", f"--uri-root={source.uri}", f"--uri-root={files}", *flags) as store:
        client = Client(store.address)
        client.register_base_model()
        answer = register(client, f"{source.uri}/some%20dir/%C3%A4+1")
        assert (answer.existed, answer.version.identity.version) == (False, 1)
        assert client.register("x", adapter).existed
        assert register(client, f"{source.uri}/some dir/ä+1/").existed
        assert register(client, other.as_uri()).version.identity.version == 2
        for file, data in adapter.files().items():
            parts = client("DownloadVersion", adapter="x", version=1, file=file)
            assert b"".join(part.data for part in parts) == data
        command = [
            sys.executable,
            "-m",
            "services.cli.main",
            "--store-admin",
            store.address,
            "adapters",
            "register-uri",
            "y",
        ]
        command += [f"{source.uri}/some%20dir/%C3%A4+1", "--base-model", BASE_MODEL]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.stdout.startswith("default/y@1 is registered"), done.stderr
        client.channel.close()


def test_a_whole_bucket_and_an_adapter_at_the_root_itself(source: Source, tmp_path: Path) -> None:
    source.save("x", make_adapter())
    whole, exact = Source(source.server, ""), Source(source.server, f"{source.prefix}/x")
    for number, (root, uri) in enumerate(((whole, f"{source.uri}/x"), (exact, exact.uri), (exact, f"{exact.uri}/"))):
        store = RunningStore(tmp_path / str(number), (root.bucket(),))
        store.client.register_base_model()
        assert register(store.client, uri).version.identity.version == 1
        store.close()


def test_a_store_on_s3_imports_from_s3(source: Source, tmp_path: Path) -> None:
    source.save("in/x", make_adapter())
    flags = [f"--s3-endpoint-url={source.server.endpoint_url}", f"--s3-region={source.server.region}"]
    flags += [f"--blobs={source.uri}/store", f"--uri-root={source.uri}/in"]
    with run_store(tmp_path / "data", *flags) as store:
        client = Client(store.address)
        client.register_base_model()
        assert register(client, f"{source.uri}/in/x").version.identity.version == 1
        with pytest.raises(PermissionDenied):
            register(client, f"{source.uri}/store")
        client.channel.close()


def test_what_is_outside_the_roots_is_refused_unasked(
    running: RunningStore, source: Source, fault_proxy: FaultProxy
) -> None:
    source.save("x", make_adapter())
    beside = Source(source.server, f"{source.prefix}-beside")
    beside.save("x", make_adapter())
    bucket, prefix = source.server.bucket, source.prefix
    for uri in (
        f"{beside.uri}/x",
        f"s3://other/{prefix}/x",
        f"s3://{bucket}",
        f"s3://{bucket}/",
        f"s3://{bucket}/x",
        f"s3://{bucket}/../x",
        f"s3://{bucket}//{prefix}/x",
        f"s3://{bucket}/{prefix}/../{prefix}/x",
        f"s3://{bucket}/{prefix}/x/..",
        f"s3://{bucket}/{prefix}/%2e%2e/{prefix}-beside/x",
        f"s3://{bucket}/{prefix}%2F..%2F{prefix}-beside/x",
        f"s3://{bucket}/{prefix}/./x",
        f"s3://{bucket}/{prefix}//x",
        f"s3://{bucket}/{prefix}/x//",
        f"s3://{bucket}/{prefix}/%252e%252e/x/../x",
        f"s3://{bucket.upper()}/{prefix}/x",
        f"s3://test:testsecret@{bucket}/{prefix}/x",
        f"s3://{bucket}:443/{prefix}/x",
        f"s3://{bucket}.evil.example/{prefix}/x",
        f"s3://169.254.169.254/{prefix}/x",
        "s3://",
        "s3:///x",
        "file:///etc",
    ):
        error = refusal(running, uri)
        assert (type(error), error.reason, error.field) == (PermissionDenied, "PATH_OUTSIDE_ROOTS", "uri"), uri
    assert fault_proxy.requests == []


@pytest.mark.parametrize(
    "rest",
    ["x?endpoint_url=http://169.254.169.254", "x#part", "x%00", "x%0a", "x\n", "%ff", "x" * (MAX_KEY_BYTES + 1)],
)
def test_what_is_no_uri_of_ours(running: RunningStore, source: Source, fault_proxy: FaultProxy, rest: str) -> None:
    error = refusal(running, f"{source.uri}/{rest}")
    assert (type(error), error.reason) == (InvalidArgument, "INVALID_URI")
    assert fault_proxy.requests == []


def test_what_is_not_there(running: RunningStore, source: Source) -> None:
    source.put("x/adapter_model.json", b"{}")
    source.put("xx/adapter_config.json", b"{}")
    for key in ("missing", "x", "%252e%252e", "x/adapter_model.json"):
        error = refusal(running, f"{source.uri}/{key}")
        assert (type(error), error.reason) == (NotFound, "PATH_NOT_FOUND"), key


def test_incomplete_and_pickled_directories_are_refused(
    running: RunningStore, source: Source, fault_proxy: FaultProxy
) -> None:
    files = make_adapter().files()
    source.put("x/adapter_model.bin", files[WEIGHTS_FILE])
    assert refusal(running, f"{source.uri}/x").reason == "UNSAFE_FORMAT"
    source.put("x/adapter_config.json", files[CONFIG_FILE])
    assert refusal(running, f"{source.uri}/x").reason == "UNSAFE_FORMAT"
    source.put("half/adapter_config.json", files[CONFIG_FILE])
    assert refusal(running, f"{source.uri}/half").reason == "MISSING_FILE"
    source.put("half/adapter_model.safetensors", b"")
    assert refusal(running, f"{source.uri}/half").reason == "INVALID_SAFETENSORS"
    fault_proxy.ranges.clear()
    source.put("half/adapter_model.safetensors", b"PK\x03\x04" + bytes(5 * RANGE_BYTES))
    assert refusal(running, f"{source.uri}/half").reason == "UNSAFE_FORMAT"
    assert fault_proxy.ranges[-1] == f"bytes=0-{RANGE_BYTES - 1}"  # the rest was not fetched


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_too_large_is_refused_before_a_byte_is_read(
    running: RunningStore, source: Source, fault_proxy: FaultProxy, file: str
) -> None:
    source.save("x", make_adapter())
    source.put(f"x/{file}", bytes(MAX_UPLOAD_BYTES + 1))
    error = refusal(running, f"{source.uri}/x")
    assert (type(error), error.reason) == (InvalidArgument, "UPLOAD_TOO_LARGE")
    assert fault_proxy.count("GET") == 0


def test_a_few_server_errors_are_ridden_out(running: RunningStore, source: Source, fault_proxy: FaultProxy) -> None:
    source.save("x", make_adapter())
    for method, status in (("HEAD", 500), ("HEAD", 503), ("GET", 500), ("GET", 503)):
        fault_proxy.faults.append(Fault("status", method=method, contains=source.prefix, status=status))
    assert register(running.client, f"{source.uri}/x").version.identity.version == 1
    assert all(fault.times == 0 for fault in fault_proxy.faults)


@pytest.mark.parametrize("action", ["cut", "stall"])
def test_a_broken_download_is_resumed_where_it_broke(
    running: RunningStore, source: Source, fault_proxy: FaultProxy, action: Any
) -> None:
    adapter = source.save("x", make_adapter())
    fault_proxy.faults.append(Fault(action, method="GET", contains=WEIGHTS_FILE, after=300))
    assert register(running.client, f"{source.uri}/x").version.identity.version == 1
    assert running.client.register("x", adapter).existed
    ranges = -(-len(adapter.files()[WEIGHTS_FILE]) // RANGE_BYTES)
    assert fault_proxy.count("GET", WEIGHTS_FILE) == ranges + 1
    if action == "cut":  # what a silent connection had brought is lost
        assert fault_proxy.ranges.count(f"bytes=300-{RANGE_BYTES - 1}") == 1


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("action", ["status", "cut"])
def test_lasting_faults_are_typed_and_nothing_is_kept(
    running: RunningStore, source: Source, fault_proxy: FaultProxy, method: str, action: Any
) -> None:
    source.save("x", make_adapter())
    if (action, method) == ("cut", "HEAD"):
        action = "lose_answer"  # there is no body to cut
    contains = "" if method == "HEAD" else WEIGHTS_FILE  # the configuration has come by then
    fault_proxy.faults.append(Fault(action, method=method, contains=contains, times=ALWAYS))
    error = refusal(running, f"{source.uri}/x")
    assert (type(error), error.reason) == (Unavailable, "STORAGE_UNAVAILABLE")
    assert error.retry_after
    fault_proxy.faults.clear()
    assert register(running.client, f"{source.uri}/x").version.identity.version == 1


@pytest.mark.parametrize("what", ["other", "shorter", "gone"])
def test_a_source_that_changes_while_it_is_read_is_noticed(
    running: RunningStore, source: Source, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    source.save("x", make_adapter())
    fetch, changed = s3_ranges.fetch_range, list[str]()

    def fetch_and_change(bucket: S3Bucket, name: str, start: int, *rest: Any, **more: Any) -> Any:
        if name.endswith(WEIGHTS_FILE) and start and not changed:
            changed.append(name)
            if what == "gone":
                bucket.delete(name)
            else:
                source.put(
                    f"x/{WEIGHTS_FILE}", make_adapter(seed=1).files()[WEIGHTS_FILE][: 10 if what == "shorter" else None]
                )
        return fetch(bucket, name, start, *rest, **more)

    monkeypatch.setattr("services.adapter_store.uri_s3.fetch_range", fetch_and_change)
    error = refusal(running, f"{source.uri}/x")
    assert (type(error), error.reason) == (FailedPrecondition, "SOURCE_CHANGED")
    assert changed


def test_memory_is_a_range_at_a_time(running: RunningStore, source: Source, fault_proxy: FaultProxy) -> None:
    adapter = source.save("x", make_adapter())
    register(running.client, f"{source.uri}/x")
    spans = [tuple(map(int, asked.removeprefix("bytes=").split("-"))) for asked in fault_proxy.ranges]
    assert max(last - first + 1 for first, last in spans) == RANGE_BYTES
    assert sum(last - first + 1 for first, last in spans) == sum(map(len, adapter.files().values()))


def test_a_bucket_that_denies_or_is_missing_is_told(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.save("x", make_adapter())
    missing = S3Config("no-such-bucket", "", source.server.endpoint_url, source.server.region)
    readable = source.bucket()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    store = RunningStore(tmp_path / "data", (source.bucket(),))
    store.client.register_base_model()
    error = refusal(store, f"{source.uri}/x")
    assert (type(error), error.reason) == (FailedPrecondition, "STORAGE_ACCESS_DENIED")
    store.close()
    readable.close()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testsecret")
    store = RunningStore(tmp_path / "more", (S3Bucket(missing),))
    store.client.register_base_model()
    error = refusal(store, "s3://no-such-bucket/x")
    assert (type(error), error.reason) == (FailedPrecondition, "STORAGE_BUCKET_NOT_FOUND")
    store.close()


def test_a_reader_is_enough(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source.save("x", make_adapter())
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "readersecret")
    store = RunningStore(tmp_path / "data", (source.bucket(),))
    store.client.register_base_model()
    assert register(store.client, f"{source.uri}/x").version.identity.version == 1
    store.close()


def test_a_store_starts_while_its_source_is_away(source: Source, tmp_path: Path) -> None:
    flags = (f"--uri-root={source.uri}", "--s3-endpoint-url=http://127.0.0.1:1", "--s3-region=us-east-1")
    with run_store(tmp_path / "data", *flags) as store:
        client = Client(store.address)
        client.register_base_model()
        with pytest.raises(Unavailable, match="STORAGE_UNAVAILABLE"):
            register(client, f"{source.uri}/x")
        client.channel.close()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--uri-root=s3://X"], "INVALID_S3_URI"),
        (["--uri-root=s3://"], "INVALID_S3_URI"),
        (["--uri-root=s3:/bucket"], "INVALID_FLAG"),
        (["--uri-root=s3://bucket", "--s3-endpoint-url=localhost:8333"], "INVALID_FLAG"),
        (["--uri-root=s3://bucket", "--blobs=s3://bucket/store"], "INVALID_FLAG"),
        (["--uri-root=s3://bucket/store", "--blobs=s3://bucket/store/a"], "INVALID_FLAG"),
    ],
)
def test_wrong_flags_are_refused(flags: list[str], reason: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_arguments(["--data-dir", str(tmp_path), *flags])
    assert caught.value.reason == reason


def test_boto3_comes_with_a_bucket_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    program = (
        "import sys; from pathlib import Path; from services.adapter_store.backends import open_root;"
        "from services.adapter_store.uri import UriRoots;"
        "UriRoots([open_root(Path())]); sys.exit('boto3' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
    monkeypatch.setitem(sys.modules, "boto3", None)
    assert main(["--port", "0", "--data-dir", str(tmp_path / "data"), "--uri-root=s3://bucket"]) == 2
    assert "--uri-root is 's3://bucket', which needs boto3" in capsys.readouterr().err
