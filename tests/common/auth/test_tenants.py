"""A tenant sees its own adapters and shared ones, and of all others it cannot tell whether they are there."""

# ruff: noqa: ARG001 -- `adapters` need only be there
from __future__ import annotations

from typing import Any

import httpx
import pytest

from multilora.adapter_store.v1 import admin_pb2, admin_pb2_grpc, store_pb2, store_pb2_grpc
from multilora.inference.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from services.common.auth.callers import Caller
from services.common.auth.permissions import RULES, Role, may
from services.common.errors import MultiloraError, NotFound, PermissionDenied
from tests.common.auth.conftest import Adapters, Client, World, ask

MODULES = {
    admin_pb2_grpc.AdapterAdminServiceStub: admin_pb2,
    store_pb2_grpc.AdapterStoreServiceStub: store_pb2,
    inference_pb2_grpc.InferenceServiceStub: inference_pb2,
    control_pb2_grpc.AdapterControlServiceStub: control_pb2,
}
HIDDEN, MISSING = "acme/pirate", "acme/nobody"


def naming_calls() -> list[tuple[Any, str, Any, str]]:
    """Every RPC whose request names an adapter, and that a tenant's admin may call: stub, name, request, the field."""
    found = []
    for kind, module in MODULES.items():
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                fields = method.input_type.fields_by_name
                key = f"/{service.full_name}/{method.name}"
                field = next((name for name in ("adapter", "reference") if name in fields), None)
                if field is not None and may(RULES[key], Role.ADMIN, every_tenant=False):
                    found.append((kind, method.name, getattr(module, method.input_type.name), field))
    return found


def filled(message: Any, field: str, adapter: str) -> Any:
    """A request that would be answered if the adapter were the caller's."""
    fields = message.DESCRIPTOR.fields_by_name
    good = {"version": 1, "alias": "stable", "file": "adapter_config.json", "text": "x"}
    request = message(**{field: adapter} | {name: value for name, value in good.items() if name in fields})
    if "targets" in fields:
        request.targets.add(version=1)
    return request


def told(client: Client, kind: Any, name: str, message: Any) -> MultiloraError:
    with pytest.raises(MultiloraError) as raised:
        client.call(kind, name, message)
    return raised.value


def test_lists_show_a_tenants_own_and_shared_adapters(world: World, adapters: Adapters) -> None:
    for tenant, size in (("acme", 100), ("acme", 1), ("beta", 1)):
        client, names, token = world.client(f"{tenant}-reader"), [], ""
        while True:
            page = client.admin("ListAdapters", page_size=size, page_token=token)
            names += [adapter.name for adapter in page.adapters]
            token = page.next_page_token
            if not token:
                break
        assert names == [f"{tenant}/pirate", "shared/common"]
    beta = world.client("beta-reader")
    assert list(beta.admin("ListAdapters", tenant="acme").adapters) == []
    assert list(beta.admin("ListAdapters", tenant="nobody").adapters) == []
    everybodys = world.client("ops-reader").admin("ListAdapters").adapters
    assert {"acme/pirate", "beta/pirate", "shared/common"} <= {adapter.name for adapter in everybodys}


def test_every_call_that_names_an_adapter_is_tried() -> None:
    assert len(naming_calls()) >= 13


@pytest.mark.parametrize("call", naming_calls(), ids=lambda call: call[1])
def test_anothers_adapter_is_as_if_there_were_none(world: World, adapters: Adapters, call: Any) -> None:
    kind, name, message, field = call
    client = world.client("beta-admin")

    def refusals(suffix: str) -> list[dict[str, Any]]:
        tried = [(each, filled(message, field, each + suffix)) for each in (HIDDEN, MISSING)]
        return [vars(told(client, kind, name, request)) | {"adapter": each} for each, request in tried]

    for suffix in ("@1", "@9", ":stable", ":nothing", ":latest"):  # which most calls take from nobody
        hidden, missing = refusals(suffix)
        assert str(hidden).replace("pirate", "nobody") == str(missing)
    hidden, missing = refusals("")
    assert hidden["reason"] == "ADAPTER_NOT_FOUND"
    assert {key: str(value).replace(HIDDEN, MISSING) for key, value in hidden.items()} == {
        key: str(value) for key, value in missing.items()
    }
    own = told(client, kind, name, filled(message, field, "beta/nobody"))
    assert (type(own), own.reason) == (NotFound, hidden["reason"])
    assert own.message.replace("beta/nobody", MISSING) == missing["message"]


BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/load_lora_adapter": {},
    "/v1/unload_lora_adapter": {},
}


def test_every_route_that_is_posted_to_names_an_adapter() -> None:
    assert {f"POST {path}" for path in BODIES} == {key for key in RULES if key.startswith("POST ")}


@pytest.mark.parametrize("suffix", ["", "@1", ":stable"])
@pytest.mark.parametrize("path", BODIES)
def test_over_http_too(world: World, adapters: Adapters, path: str, suffix: str) -> None:
    answers = []
    with httpx.Client(verify=world.tls) as http:
        for adapter in (HIDDEN, MISSING):
            named = {"lora_name" if "lora" in path else "model": adapter + suffix}
            headers = {"Authorization": f"Bearer {world.tokens['beta-admin']}"}
            answer = http.post(f"{world.https}{path}", headers=headers, json=BODIES[path] | named)
            answers.append((answer.status_code, answer.text.replace(HIDDEN, MISSING), sorted(answer.headers)))
    assert answers[0] == answers[1]
    assert answers[0][0] == 404


def test_anothers_requests_are_not_to_be_told_by_their_ids(world: World) -> None:
    acme = world.client("acme-reader")
    stub = inference_pb2_grpc.InferenceServiceStub(acme.channel(world.inference.address))
    message = ask()
    message.request_id = "mine"
    with world.inference.held():
        first = stub.Generate(message, metadata=acme.metadata, timeout=60)
        world.inference.wait_in_flight(Caller("acme-reader", Role.READER, "acme").salted("mine"))
        assert told(acme, inference_pb2_grpc.InferenceServiceStub, "Generate", message).reason == "REQUEST_ID_IN_USE"
        beta = world.client("beta-reader")
        stub = inference_pb2_grpc.InferenceServiceStub(beta.channel(world.inference.address))
        second = stub.Generate(message, metadata=beta.metadata, timeout=60)
        world.inference.wait_in_flight(Caller("beta-reader", Role.READER, "beta").salted("mine"))
    assert [next(answers).started.request_id for answers in (first, second)] == ["mine", "mine"]


def test_a_bare_name_is_the_callers(world: World, adapters: Adapters) -> None:
    acme = world.client("acme-reader").generate(ask("pirate")).started
    beta = world.client("beta-reader").generate(ask("pirate")).started
    assert acme.digest == adapters.acme.identity.digest != beta.digest == adapters.beta.identity.digest


def test_shared_adapters_are_called_by_all_and_changed_by_their_own(world: World, adapters: Adapters) -> None:
    started = world.client("beta-reader").generate(ask("shared/common")).started
    assert started.digest == adapters.shared.identity.digest
    targets = [admin_pb2.WeightedVersion(version=1)]
    for tenant, refused in (("beta", "NOT_YOUR_TENANT"), ("ops", "")):
        client = world.client(f"{tenant}-admin")
        if refused:
            error = client.refusal("SetAlias", adapter="shared/common", alias="canary", targets=targets)
            assert (type(error), error.reason) == (PermissionDenied, refused)
        else:
            client.admin("SetAlias", adapter="shared/common", alias="canary", targets=targets)
    for kind, name in ((control_pb2_grpc.AdapterControlServiceStub, "UnloadAdapter"),):
        request = control_pb2.UnloadAdapterRequest(adapter="shared/common")
        assert told(world.client("beta-admin"), kind, name, request).reason == "NOT_YOUR_TENANT"


def test_nobody_registers_for_another_tenant(world: World, adapters: Adapters) -> None:
    for name in (HIDDEN, MISSING, "shared/mine"):
        with pytest.raises(PermissionDenied) as raised:
            world.client("beta-publisher").register(name, adapters.directory)
        assert raised.value.reason == "NOT_YOUR_TENANT"


def test_what_is_resident_is_shown_by_tenant(world: World, adapters: Adapters) -> None:
    for tenant in ("acme", "beta"):
        world.client(f"{tenant}-reader").generate(ask("pirate"))
    beta = world.client("beta-reader")
    listed = beta.call(control_pb2_grpc.AdapterControlServiceStub, "ListAdapters", control_pb2.ListAdaptersRequest())
    names = {resident.identity.adapter for resident in listed.adapters}
    assert "beta/pirate" in names
    assert not any(name.startswith("acme/") for name in names)
    with httpx.Client(verify=world.tls) as http:
        headers = {"Authorization": f"Bearer {beta.token}"}
        models = http.get(f"{world.https}/v1/models", headers=headers).json()["data"]
    assert "beta/pirate" in {model["id"] for model in models}
    assert "acme" not in str(models)


def test_prefixes_are_shared_within_a_tenant_alone(world: World, adapters: Adapters) -> None:
    prompt = "what only one tenant has asked so far, and long enough to fill some blocks of the cache"
    cached = [
        world.client(f"{tenant}-reader").generate(ask("shared/common", prompt)).started.cached_tokens > 0
        for tenant in ("acme", "acme", "beta", "beta", "acme")
    ]
    assert cached == [False, True, False, True, True]


def test_paths_are_for_every_tenants_callers(world: World, adapters: Adapters) -> None:
    """And what they register is registered in their own name, not the replica's, which may not."""
    request = control_pb2.LoadAdapterRequest(adapter="pathy", path="acme")
    kind = control_pb2_grpc.AdapterControlServiceStub
    assert told(world.client("acme-admin"), kind, "LoadAdapter", request).reason == "EVERY_TENANT_ONLY"
    world.client("ops-publisher").call(kind, "LoadAdapter", request)
    (entry,) = world.client("ops-admin").admin("GetHistory", adapter="default/pathy").entries
    assert entry.actor == "ops-publisher"
