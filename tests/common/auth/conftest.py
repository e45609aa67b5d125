"""Both services over TLS, asking for tokens, with a tenant or two."""

from __future__ import annotations

import json
import logging
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from multilora.adapter_store.v1 import admin_pb2, admin_pb2_grpc
from multilora.inference.v1 import inference_pb2, inference_pb2_grpc
from services.bench.certificates import Authority
from services.common.auth.credentials import Credentials
from services.common.auth.permissions import Role
from services.common.auth.settings import Security
from services.common.auth.tokens import add_token
from services.common.errors import MultiloraError
from services.common.rpc import from_rpc_error
from tests.assets.random_adapter import make_random_adapter
from tests.clients import Answer, request
from tests.conftest import ROOT, TINY_BASE, InferenceServer, inference_config, run_inference, upload_messages

TENANTS = ("acme", "beta", "slow", "busy", "frugal", "small", "gamma")
LIMITS = """
[tenants.slow]
requests_per_second = 0.01
[tenants.busy]
concurrency = 1
[tenants.frugal]
tokens_per_minute = 4
[tenants.small]
max_adapters = 1
max_bytes = 1000000
"""


@dataclass
class Client:
    """Calls as one caller. Whatever a server refuses is raised as it was raised there."""

    world: World
    token: str
    channels: dict[str, grpc.Channel] = field(default_factory=dict)

    def channel(self, address: str) -> grpc.Channel:
        if address not in self.channels:
            self.channels[address] = Credentials(ca=self.world.authority.ca).channel(address)
        return self.channels[address]

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def call(self, kind: Any, name: str, message: Any, *, metadata: Any = (), timeout: float = 60) -> Any:
        """`name` of the stub `kind`; a stream's answers as a list."""
        method = getattr(kind(self.channel(self.world.address_of(kind))), name)
        try:
            answer = method(message, metadata=(*self.metadata, *metadata), timeout=timeout)
            return answer if hasattr(answer, "DESCRIPTOR") else list(answer)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def admin(self, name: str, /, **fields: Any) -> Any:
        """An RPC of AdapterAdminService, by the fields of its request."""
        return self.call(admin_pb2_grpc.AdapterAdminServiceStub, name, getattr(admin_pb2, f"{name}Request")(**fields))

    def register(self, adapter: str, directory: Path, **header: Any) -> admin_pb2.AdapterVersion:
        messages = upload_messages(adapter, directory, TINY_BASE, **header)
        return self.call(admin_pb2_grpc.AdapterAdminServiceStub, "RegisterVersion", messages).version

    def generate(self, message: inference_pb2.GenerateRequest) -> Answer:
        events = self.call(inference_pb2_grpc.InferenceServiceStub, "Generate", message)
        ids = [token for event in events if event.HasField("chunk") for token in event.chunk.token_ids]
        return Answer(events[0].started, ids, [], "", events[-1].finished)

    def refusal(self, name: str, /, **fields: Any) -> MultiloraError:
        with pytest.raises(MultiloraError) as raised:
            self.admin(name, **fields)
        return raised.value


@dataclass
class World:
    """tokens: by `tenant-role`, `ops` being every tenant; log: what both services logged"""

    authority: Authority
    directory: Path
    store: str
    store_admin: str
    tokens: dict[str, str]
    inference: InferenceServer = field(init=False, repr=False)
    records: list[str] = field(default_factory=list)

    def address_of(self, kind: Any) -> str:
        match kind.__name__.removesuffix("Stub"):
            case "AdapterStoreService":
                return self.store
            case "AdapterAdminService":
                return self.store_admin
            case "InferenceService":
                return self.inference.address
            case _:
                return self.inference.admin

    def client(self, name: str) -> Client:
        """`acme-reader`; an empty name shows no token."""
        return Client(self, self.tokens[name] if name else "")

    @property
    def https(self) -> str:
        return self.inference.http.replace("http://", "https://")

    @property
    def tls(self) -> ssl.SSLContext:
        """For clients of HTTP."""
        return ssl.create_default_context(cafile=str(self.authority.ca))

    def audit(self, service: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / f"{service}.audit").read_text().splitlines()]


@pytest.fixture(scope="package")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, authority: Authority) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("secure")
    shown = authority.issue("localhost")
    tokens_file = directory / "tokens.toml"
    tokens_file.write_text(LIMITS)
    tokens = {
        f"{tenant}-{role}": add_token(tokens_file, name=f"{tenant}-{role}", role=role, tenant=tenant)
        for tenant in TENANTS
        for role in (Role.ADMIN, Role.PUBLISHER, Role.READER)
    }
    for role in Role:
        tokens[f"ops-{role}"] = add_token(tokens_file, name=f"ops-{role}", role=role, tenant="*")
    replica = directory / "replica.token"
    replica.write_text(tokens["ops-replica"] + "\n")
    tls = ["--tls-cert", str(shown.cert), "--tls-key", str(shown.key), "--tokens", str(tokens_file)]
    command = [sys.executable, "-m", "services.adapter_store", "--port", "0", "--admin-port", "0", *tls]
    command += ["--data-dir", str(directory / "store"), "--audit-log", str(directory / "store.audit")]
    with (
        (directory / "store.log").open("w") as log,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline().strip()
            assert line.startswith("listening on "), (directory / "store.log").read_text()
            store, admin = line.removeprefix("listening on ").split(" admin=")
            world = World(authority, directory, store, admin, tokens)
            world.client("ops-admin").admin(
                "RegisterBaseModel", name=TINY_BASE, config_json=(tiny_model / "config.json").read_text()
            )
            config = inference_config(
                tiny_model,
                directory / "cache",
                adapter_store=store,
                adapter_store_admin=admin,
                adapter_root=directory,
                admin_port=0,
                threads=1,
                store_credentials=Credentials(ca=authority.ca, token_file=replica),
                security=Security(
                    tls_cert=shown.cert,
                    tls_key=shown.key,
                    tokens=tokens_file,
                    audit_log=str(directory / "inference.audit"),
                ),
            )
            with KeptLog(world.records), run_inference(config) as server:
                world.inference = server
                yield world
        finally:
            process.terminate()
            process.wait(timeout=20)


class KeptLog(logging.Handler):
    """What this process logs meanwhile, at every level."""

    def __init__(self, records: list[str]) -> None:
        super().__init__(logging.DEBUG)
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(self.format(record))

    def __enter__(self) -> None:
        root = logging.getLogger()
        self._level = root.level
        root.setLevel(logging.DEBUG)
        root.addHandler(self)
        # It names servers that are just being freed, which pytest's records then keep: that crashes.
        logging.getLogger("grpc._cython").setLevel(logging.INFO)

    def __exit__(self, *_: object) -> None:
        root = logging.getLogger()
        logging.getLogger("grpc._cython").setLevel(logging.NOTSET)
        root.removeHandler(self)
        root.setLevel(self._level)


@dataclass(frozen=True)
class Adapters:
    """Versions: `pirate` of acme and of beta, which are not the same, and `shared/common`."""

    acme: admin_pb2.AdapterVersion
    beta: admin_pb2.AdapterVersion
    shared: admin_pb2.AdapterVersion
    directory: Path


@pytest.fixture(scope="package")
def adapters(world: World, tiny_model: Path) -> Adapters:
    made = [
        make_random_adapter(world.directory / name, tiny_model, base_model_name_or_path=TINY_BASE, seed=seed)
        for seed, name in enumerate(("acme", "beta", "shared"))
    ]
    return Adapters(
        world.client("acme-publisher").register("pirate", made[0]),
        world.client("beta-publisher").register("pirate", made[1]),
        world.client("ops-publisher").register("shared/common", made[2]),
        made[0],
    )


def ask(adapter: str = "", prompt: str = "a common beginning, long enough for a block or two of it") -> Any:
    return request(prompt, adapter=adapter, max_tokens=2)
