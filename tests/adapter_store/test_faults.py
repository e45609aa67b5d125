"""Full disks, clocks that jump, adapters larger than memory, and collections beside registrations: nothing is lost."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.adapter_store.records import Registered, UploadHeader
from services.adapter_store.registration import Registration
from services.adapter_store.store import AdapterStore
from services.common.errors import ResourceExhausted
from services.common.profile import profile_from_config
from services.common.references import AdapterName
from tests.adapter_store.conftest import TIMEOUT_SECONDS, Client, make_store
from tests.adapter_store.uploads import BASE_MODEL, MAX_RANK, MODEL_CONFIG, PEFT_CONFIG, Adapter, Tensor, make_adapter
from tests.contracts.backends import place
from tests.contracts.store_model_places import SqliteCopies

ROOT = Path(__file__).parents[2]
NAME = AdapterName("acme", "x")
DAY_NS = 24 * 3600 * 10**9
PROFILE = profile_from_config(BASE_MODEL, json.dumps(MODEL_CONFIG), max_lora_rank=MAX_RANK)
# A store whose files may not grow beyond so many bytes: to whoever writes, it is a full disk (EFBIG for ENOSPC).
LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
from services.adapter_store.__main__ import main
main()
"""


def upload(store: AdapterStore, adapter: Adapter, name: AdapterName = NAME) -> Registered:
    header = UploadHeader(name, BASE_MODEL)
    with store.registration.begin_upload(header) as files:
        for file, data in adapter.files().items():
            files.write(file, data)
        return store.registration.register(header, files)


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[tuple[Client, Path, int]]:
    data = tmp_path / "data"
    flags = ["--port", "0", "--admin-port", "-1", "--data-dir", str(data)]
    command = [sys.executable, "-c", LIMITED, str(256 << 10), *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        client = Client(process.stdout.readline().split()[-1])
        try:
            client.register_base_model()
            yield client, data, process.pid
        finally:
            client.channel.close()
            process.terminate()
            process.wait(TIMEOUT_SECONDS)


def test_a_full_disk_refuses_and_goes_on(limited: tuple[Client, Path, int]) -> None:
    client, data, pid = limited
    first = client.register("x", make_adapter()).version.identity
    before = {path for folder in ("tmp", "blobs", "log") for path in (data / folder).rglob("*")}
    large = make_adapter(seed=1)
    large.tensors["base_model.model.model.embed_tokens.base_layer.weight"] = Tensor("F32", [32, 2400], bytes(300 << 10))
    for _ in range(2):
        with pytest.raises(ResourceExhausted) as caught:
            client.register("x", large)
        assert caught.value.reason == "DISK_FULL"
        assert {path for folder in ("tmp", "blobs", "log") for path in (data / folder).rglob("*")} == before
    assert not [fd for fd in Path(f"/proc/{pid}/fd").iterdir() if ".part" in str(fd.readlink())]
    assert client.resolve("x").identity == first
    assert client.pull(first.pack_digest)
    assert client.register("x", make_adapter(seed=1)).version.identity.version == 2
    assert list(client("VerifyIntegrity").problems) == []


@pytest.mark.parametrize("call", ["mkdir", "link", "open"])
def test_a_disk_without_room_for_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """No room for a directory, a link or a new file, at each time that one is asked for in turn."""
    store = make_store(tmp_path)
    store.changes.register_base_model(PROFILE)
    owner = {"mkdir": Path, "link": os, "open": Path}[call]
    real, refused = getattr(owner, call), 0
    for failing in range(10):
        count = 0

        def full(*arguments: Any, failing: int = failing, **options: Any) -> Any:
            nonlocal count
            writes = call != "open" or "xb" in arguments
            count += writes
            if writes and count == failing + 1:
                raise OSError(28, "No space left on device")
            return real(*arguments, **options)

        monkeypatch.setattr(owner, call, full)
        try:
            upload(store, make_adapter(seed=failing, rank=1 + failing % MAX_RANK))
        except ResourceExhausted:  # and nothing else
            refused += 1
        monkeypatch.undo()
        assert list((tmp_path / "tmp").iterdir()) == []
        number = upload(store, make_adapter(seed=failing, rank=1 + failing % MAX_RANK)).version.number
        assert number == failing + 1
        assert store.verify().problems == []
    assert refused >= 2
    store.close()


@pytest.fixture
def clock() -> list[int]:
    return [time.time_ns()]


@pytest.fixture
def timed(tmp_path: Path, clock: list[int]) -> Iterator[AdapterStore]:
    store = make_store(tmp_path, clock=lambda: clock[0])
    store.changes.register_base_model(PROFILE)
    yield store
    store.close()


def test_a_clock_that_goes_back_changes_no_order(timed: AdapterStore, clock: list[int]) -> None:
    for seed in range(4):
        clock[0] -= 10 * DAY_NS
        assert upload(timed, make_adapter(seed=seed)).version.number == seed + 1
    rows, _ = timed.history(NAME, 0, "")
    assert [seq for seq, _ in rows] == [4, 3, 2, 1]
    assert timed.catalog.adapter(NAME).latest_version == 4
    timed.journal.rebuild()
    assert timed.catalog.adapter(NAME).latest_version == 4
    assert timed.verify().problems == []


def test_a_clock_that_goes_back_shortens_no_grace(timed: AdapterStore, clock: list[int]) -> None:
    for seed in range(2):
        upload(timed, make_adapter(seed=seed))
    clock[0] += 30 * DAY_NS
    timed.changes.delete_version(NAME, 2)
    clock[0] -= 29 * DAY_NS
    assert timed.collection.collect(dry_run=False).versions == []
    timed.changes.undelete_version(NAME, 2)
    timed.changes.delete_version(NAME, 2)
    assert timed.collection.collect(dry_run=False).versions == []
    clock[0] += 8 * DAY_NS
    assert timed.collection.collect(dry_run=False).versions == ["acme/x@2"]
    assert timed.verify().problems == []


@pytest.mark.parametrize("jump", [DAY_NS, -DAY_NS])
def test_a_clock_that_jumps_during_a_registration(
    timed: AdapterStore, clock: list[int], monkeypatch: pytest.MonkeyPatch, jump: int
) -> None:
    """Its blobs are committed, the clock jumps by more than the grace of blobs, and all is collected before its entry:
    the version is whole, or is not there."""
    commit = Registration._commit

    def interrupted(self: Registration, *arguments: Any) -> Any:
        content = commit(self, *arguments)
        monkeypatch.undo()
        clock[0] += jump
        timed.collection.collect(dry_run=False)
        return content

    monkeypatch.setattr(Registration, "_commit", interrupted)
    upload(timed, make_adapter())
    assert timed.verify().problems == []


def churn(store: AdapterStore, rounds: int) -> None:
    """Registrations of few contents, deletions and collections, all at once."""
    stop, failed = threading.Event(), list[BaseException]()

    def collect() -> None:
        while not stop.is_set():
            try:
                store.collection.collect(dry_run=False)
            except BaseException as error:
                failed.append(error)
                return

    def register(worker: int) -> None:
        name = AdapterName("acme", f"x{worker}")
        upload(store, make_adapter(seed=9, rank=1), name)
        for number in range(rounds):
            version = upload(store, make_adapter(seed=number % 3, rank=1), name).version.number
            store.changes.delete_version(name, version)

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(register, range(3)))
    finally:
        stop.set()
        collector.join(TIMEOUT_SECONDS)
    assert failed == []
    assert store.verify().problems == []


def test_collections_beside_registrations_on_disk(tmp_path: Path) -> None:
    """A second's grace where an hour's is the rule: deleted at once, collected at once."""
    store = make_store(tmp_path, delete_grace=0, blob_grace=1.0)
    store.changes.register_base_model(PROFILE)
    churn(store, 40)
    store.close()


def test_collections_beside_registrations_on_s3(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place("s3", tmp_path, request, monkeypatch) as here:
        index = SqliteCopies(tmp_path / "index.sqlite3").open()
        store = AdapterStore(here.blobs(), here.log(), index, max_upload_bytes=1 << 20, delete_grace=0, blob_grace=5.0)
        store.changes.register_base_model(PROFILE)
        churn(store, 3)
        index.close()


def rss_anon(pid: int) -> int:
    """Bytes of a process's memory that no file backs."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon:"))


@pytest.mark.slow
def test_a_gigabyte_registers_in_little_memory(tmp_path: Path) -> None:
    """1 GiB of bfloat16: 64 layers of 16 MiB, of ones."""
    width, rank, layers = 8192, 256, 64
    model = {**MODEL_CONFIG, "hidden_size": width, "num_attention_heads": 64, "num_key_value_heads": 64}
    model |= {"intermediate_size": width, "num_hidden_layers": layers, "num_local_experts": None}
    modules, header, end = ("q_proj", "o_proj"), dict[str, Any](), 0
    for layer in range(layers):
        for module in modules:
            for side, shape in (("A", [rank, width]), ("B", [width, rank])):
                name = f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{side}.weight"
                header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * rank * width]}
                end += 2 * rank * width
    assert end == 1 << 30
    root = tmp_path / "root"
    root.mkdir()
    config = {**PEFT_CONFIG, "r": rank, "lora_alpha": 16, "target_modules": list(modules)}
    (root / "adapter_config.json").write_text(json.dumps(config))
    text = json.dumps(header).encode()
    ones = np.full(rank * width, 0x3F80, dtype="<u2").tobytes()
    with (root / "adapter_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(end // len(ones)):
            file.write(ones)

    flags = ["--port", "0", "--admin-port", "-1", "--data-dir", str(tmp_path / "data")]
    command = [sys.executable, "-m", "services.adapter_store", *flags]
    with subprocess.Popen([*command, "--uri-root", str(root)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        client = Client(process.stdout.readline().split()[-1])
        stop, peak = threading.Event(), [0]

        def watch() -> None:
            while not stop.wait(0.01):
                peak[0] = max(peak[0], rss_anon(process.pid))

        watcher = threading.Thread(target=watch)
        try:
            client.register_base_model(config_json=json.dumps(model), max_lora_rank=rank)
            watcher.start()
            answer = client("RegisterFromUri", header={"adapter": "x", "base_model": BASE_MODEL}, uri=root.as_uri())
        finally:
            stop.set()
            if watcher.is_alive():
                watcher.join()
            client.channel.close()
            process.terminate()
            process.wait(TIMEOUT_SECONDS)
    assert answer.version.identity.version == 1
    assert peak[0] < 200 << 20, f"{peak[0] >> 20} MiB"
