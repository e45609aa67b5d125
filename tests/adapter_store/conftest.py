"""A real store server on a random port, and a client that raises the errors it raised."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import settings

from multilora.adapter_store.v1 import admin_pb2, admin_pb2_grpc, store_pb2, store_pb2_grpc
from services.adapter_store.blobs.disk import DiskBlobs
from services.adapter_store.index.sqlite import SqliteIndex
from services.adapter_store.log.disk import DiskLog
from services.adapter_store.server import make_server, serving
from services.adapter_store.store import AdapterStore
from services.common.rpc import from_rpc_error
from tests.adapter_store import uploads

# No example may fail for being slow: other work runs on the same cores. What hangs meets the test's own timeout.
settings.register_profile("multilora", deadline=None)
settings.load_profile("multilora")

TIMEOUT_SECONDS = 60
MAX_UPLOAD_BYTES = 1 << 20
HEARTBEAT_SECONDS = 0.2


class Client:
    """Both services of a store. Every call raises the MultiloraError that the server raised."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address)
        self._admin = admin_pb2_grpc.AdapterAdminServiceStub(self.channel)
        self._store = store_pb2_grpc.AdapterStoreServiceStub(self.channel)

    def __call__(self, method: str, request: Any = None, **fields: Any) -> Any:
        """Call by name: `client("GetAdapter", adapter="x")`, or with a request, or an iterator of them.

        The field `actor` goes into the metadata.
        """
        actor = fields.pop("actor", "")
        stub, messages = (self._store, store_pb2) if hasattr(self._store, method) else (self._admin, admin_pb2)
        sent = getattr(messages, f"{method}Request")(**fields) if request is None else request
        try:
            metadata = [("x-multilora-actor", actor)] if actor else []
            answer = getattr(stub, method)(sent, timeout=TIMEOUT_SECONDS, metadata=metadata)
            return list(answer) if hasattr(answer, "__next__") else answer
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    def register(self, name: str, adapter: uploads.Adapter, **fields: Any) -> admin_pb2.RegisterVersionResponse:
        answer: admin_pb2.RegisterVersionResponse = self("RegisterVersion", uploads.requests(name, adapter, **fields))
        return answer

    def register_base_model(self, name: str = uploads.BASE_MODEL, **fields: Any) -> Any:
        fields.setdefault("config_json", json.dumps(uploads.MODEL_CONFIG))
        fields.setdefault("max_lora_rank", uploads.MAX_RANK)
        return self("RegisterBaseModel", name=name, **fields)

    def resolve(self, reference: str, base_model: str = "", routing_key: str = "") -> Any:
        return self("ResolveAdapter", reference=reference, base_model=base_model, routing_key=routing_key)

    @contextlib.contextmanager
    def watch(self, after_revision: int = 0, epoch: str = "") -> Iterator[Iterator[store_pb2.WatchAdaptersResponse]]:
        """What WatchAdapters sends, until the context ends."""
        request = store_pb2.WatchAdaptersRequest(after_revision=after_revision, epoch=epoch)
        call = self._store.WatchAdapters(request, timeout=TIMEOUT_SECONDS)
        try:
            yield iter(call)
        finally:
            call.cancel()

    def pull(self, digest: str, offset: int = 0) -> bytes:
        return b"".join(part.data for part in self("PullAdapter", digest=digest, offset=offset))


def make_store(data_dir: Path, **settings: Any) -> AdapterStore:
    """A store over a directory, without a server."""
    index = SqliteIndex(make_directory(data_dir) / "index.sqlite3")
    return AdapterStore(
        DiskBlobs(data_dir), DiskLog(data_dir), index, **({"max_upload_bytes": MAX_UPLOAD_BYTES} | settings)
    )


def make_directory(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


class RunningStore:
    """A store server in a thread of its own, over a directory that a test may look into."""

    def __init__(self, data_dir: Path, uri_roots: tuple[Path, ...] = (), **settings: Any) -> None:
        self.data_dir = data_dir
        self._settings = settings
        self._uri_roots = uri_roots
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._started.wait(TIMEOUT_SECONDS)
        self.client = Client(f"127.0.0.1:{self.port}")

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = make_server()
        self.port = server.bind("127.0.0.1:0")
        self.store = make_store(self.data_dir, uri_roots=self._uri_roots, **self._settings)
        self.store.heal()
        async with serving(server, self.store, stop_grace=0, heartbeat=HEARTBEAT_SECONDS):
            self._started.set()
            await self._stop.wait()
        self.store.close()

    def close(self) -> None:
        self.client.channel.close()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(TIMEOUT_SECONDS)

    def blob_files(self) -> set[str]:
        """Every file that bytes of uploads may lie in."""
        return {
            str(path.relative_to(self.data_dir))
            for folder in ("tmp", "blobs")
            for path in (self.data_dir / folder).rglob("*")
            if path.is_file()
        }


@pytest.fixture
def uri_root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    return root


@pytest.fixture
def running(tmp_path: Path, uri_root: Path) -> Iterator[RunningStore]:
    """A store that knows the tiny base model."""
    store = RunningStore(tmp_path / "data", (uri_root,))
    store.client.register_base_model(accepted_names=["org/Tiny-Llama"])
    yield store
    store.close()


@pytest.fixture
def client(running: RunningStore) -> Client:
    return running.client


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStore]:
    """One store for a whole module, for cases that leave nothing behind."""
    store = RunningStore(tmp_path_factory.mktemp("shared"), ())
    store.client.register_base_model(accepted_names=["org/Tiny-Llama"])
    yield store
    store.close()
