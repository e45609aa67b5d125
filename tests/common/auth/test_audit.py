"""Changes are recorded, with who asked for them; secrets are recorded nowhere."""

# ruff: noqa: ARG001 -- `adapters` need only be there
from __future__ import annotations

from typing import Any

import httpx
import pytest

from multilora.adapter_store.v1 import admin_pb2, admin_pb2_grpc
from multilora.inference.v1 import control_pb2, control_pb2_grpc
from services.common.auth.audit import Audit
from services.common.auth.callers import NOBODY
from services.common.auth.credentials import Credentials
from services.common.auth.permissions import RULES
from services.common.auth.tokens import TOKEN_PREFIX
from services.common.errors import MultiloraError
from services.inference.http.body import MAX_BODY_BYTES
from tests.common.auth.conftest import Adapters, World, ask
from tests.common.auth.every_call import refusal_of
from tests.inference.http.pair import eventually

TARGETS = [admin_pb2.WeightedVersion(version=1)]


def last(world: World, service: str, call: str) -> dict[str, Any]:
    return next(entry for entry in reversed(world.audit(service)) if entry["call"].endswith(call))


def test_the_stores_record_says_who_did_what(world: World, adapters: Adapters) -> None:
    publisher = world.client("gamma-publisher")
    publisher.register("recorded", adapters.directory)
    entry = last(world, "store", "/RegisterVersion")
    assert (entry["who"], entry["role"], entry["tenant"]) == ("gamma-publisher", "publisher", "gamma")
    assert (entry["service"], entry["peer"], entry["outcome"]) == ("adapter-store", "127.0.0.1", "OK")
    assert entry["what"]["adapter"] == "gamma/recorded"
    assert entry["what"]["version"] == 1
    publisher.admin("SetAlias", adapter="recorded", alias="canary", targets=TARGETS)
    entry = last(world, "store", "/SetAlias")
    assert entry["what"] == {"adapter": "gamma/recorded", "alias": "canary", "targets": [{"version": 1}]}


def test_refused_changes_stand_there_too(world: World, adapters: Adapters) -> None:
    reader = world.client("acme-reader")
    assert reader.refusal("SetAlias", adapter="pirate", alias="x", targets=TARGETS).reason == "ROLE_NOT_PERMITTED"
    entry = last(world, "store", "/SetAlias")
    assert (entry["who"], entry["outcome"]) == ("acme-reader", "ROLE_NOT_PERMITTED")
    assert world.client("beta-publisher").refusal("SetAlias", adapter="acme/pirate", alias="x", targets=TARGETS)
    assert last(world, "store", "/SetAlias")["outcome"] == "ADAPTER_NOT_FOUND"
    with pytest.raises(MultiloraError):
        world.client("beta-publisher").register("acme/pirate", adapters.directory)
    entry = last(world, "store", "/RegisterVersion")
    assert (entry["outcome"], entry["what"]["adapter"]) == ("NOT_YOUR_TENANT", "acme/pirate")


def test_the_history_names_the_caller_and_whom_they_name(world: World, adapters: Adapters) -> None:
    publisher = world.client("acme-publisher")
    request = admin_pb2.SetAliasRequest(adapter="pirate", alias="by-jane", targets=TARGETS)
    kind = admin_pb2_grpc.AdapterAdminServiceStub
    publisher.call(kind, "SetAlias", request, metadata=(("x-multilora-actor", "jane"),))
    assert publisher.admin("GetHistory", adapter="pirate").entries[0].actor == "acme-publisher (jane)"


def test_a_replicas_record(world: World, adapters: Adapters) -> None:
    request = control_pb2.LoadAdapterRequest(adapter="pirate")
    world.client("acme-publisher").call(control_pb2_grpc.AdapterControlServiceStub, "LoadAdapter", request)
    entry = last(world, "inference", "/LoadAdapter")
    assert (entry["service"], entry["who"], entry["what"]) == (
        "inference",
        "acme-publisher",
        {"adapter": "acme/pirate"},
    )
    with httpx.Client(verify=world.tls) as http:
        headers = {"Authorization": f"Bearer {world.tokens['acme-publisher']}"}
        for name, outcome in (("pirate", "OK"), ("nobody", "ADAPTER_NOT_FOUND")):
            http.post(f"{world.https}/v1/load_lora_adapter", headers=headers, json={"lora_name": name})
            entry = last(world, "inference", "POST /v1/load_lora_adapter")
            assert (entry["outcome"], entry["what"]["adapter"]) == (outcome, f"acme/{name}")


@pytest.mark.parametrize("key", [key for key, rule in RULES.items() if rule.changes])
def test_every_call_that_changes_stands_in_the_record(world: World, key: str) -> None:
    """Whether it was let in or not; here an empty request, as an admin of every tenant and as nobody's reader."""
    service = "store" if "adapter_store" in key else "inference"
    for who in ("ops-admin", "acme-reader"):
        before = len(world.audit(service))
        with httpx.Client(verify=world.tls) as http:
            refused = refusal_of(world, http, key, world.tokens[who])
        eventually(lambda before=before: len(world.audit(service)) > before)  # over HTTP it is written after the answer
        (entry,) = world.audit(service)[before:]
        assert (entry["call"], entry["who"], entry["outcome"]) == (key, who, refused or "OK")


def test_calls_that_read_are_told_from_those_that_change_by_name() -> None:
    reads = ("Get", "List", "Check", "Watch", "Resolve", "Pull", "Download", "Validate", "Verify", "Tokenize")
    reads += ("Detokenize", "Generate", "ServerReflectionInfo", "completions", "models", "health", "metrics")
    for key, rule in RULES.items():
        assert rule.changes == (not key.split("/")[-1].startswith(reads)), key


def test_a_caller_over_http_cannot_say_from_where(world: World) -> None:
    headers = {"Authorization": f"Bearer {world.tokens['acme-publisher']}", "X-Forwarded-For": "203.0.113.7"}
    headers |= {"Forwarded": "for=203.0.113.7", "X-Real-IP": "203.0.113.7"}
    answer = httpx.post(
        f"{world.https}/v1/load_lora_adapter", headers=headers, content=b"x" * (MAX_BODY_BYTES + 1), verify=world.tls
    )
    eventually(lambda: last(world, "inference", "POST /v1/load_lora_adapter")["outcome"] == "CONTENT_TOO_LARGE")
    entry = last(world, "inference", "POST /v1/load_lora_adapter")
    assert (answer.status_code, entry["outcome"], entry["peer"]) == (413, "CONTENT_TOO_LARGE", "127.0.0.1")


def test_the_record_only_grows(tmp_path: Any) -> None:
    path = tmp_path / "audit"
    path.write_text("before\n")
    for number in range(2):
        audit = Audit(str(path), "test")
        audit.write(NOBODY, "here", "/X", "OK", {"text": "x" * 1000, "data": b"abc", "number": number})
        audit.close()
    lines = path.read_text().splitlines()
    assert lines[0] == "before"
    assert len(lines) == 3
    assert len(lines[1]) < 600


def test_secrets_are_logged_nowhere(world: World, adapters: Adapters) -> None:
    wrong = world.client("acme-reader")
    wrong.token = "mlt_wrong-secret-that-nobody-has"
    with pytest.raises(MultiloraError):
        wrong.admin("ListAdapters")
    with pytest.raises(MultiloraError):
        wrong.generate(ask())
    world.client("acme-reader").generate(ask("pirate"))
    told = (
        (world.directory / "store.log").read_text()
        + (world.directory / "store.audit").read_text()
        + (world.directory / "inference.audit").read_text()
        + "\n".join(world.records)
    )
    assert "listening" not in told
    assert "a call from 127.0.0.1 came with" in told or "TOO_MANY" in told
    for secret in (*world.tokens.values(), wrong.token, TOKEN_PREFIX, "PRIVATE KEY"):
        assert secret not in told
    for key in world.authority.ca.parent.glob("*.key"):
        assert not any(line in told for line in key.read_text().splitlines()[1:-1]), key
    assert "secret" not in repr(Credentials(token="secret"))
