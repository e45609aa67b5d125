"""Limits of a tenant: on paper with a clock of the test's own, and at both services."""

from __future__ import annotations

from pathlib import Path

import grpc
import httpx
import pytest

from multilora.inference.v1 import inference_pb2_grpc
from services.common.auth.callers import Caller
from services.common.auth.limits import Budget, Limits
from services.common.auth.permissions import Role
from services.common.errors import MultiloraError, ResourceExhausted
from tests.assets.random_adapter import make_random_adapter
from tests.common.auth.conftest import Adapters, World, ask
from tests.conftest import TINY_BASE


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def refused(budget: Budget) -> ResourceExhausted:
    with pytest.raises(ResourceExhausted) as raised, budget.request():
        pass
    return raised.value


def test_requests_a_second() -> None:
    clock = Clock()
    budget = Budget("acme", Limits(requests_per_second=2), clock)
    for _ in range(2):
        with budget.request():
            pass
    error = refused(budget)
    assert (error.reason, error.retry_after) == ("TENANT_REQUEST_RATE_LIMIT", 0.5)
    clock.now = 0.5
    with budget.request():
        pass
    refused(budget)


def test_requests_at_once_count_until_they_end() -> None:
    budget = Budget("acme", Limits(concurrency=1), Clock())
    with budget.request():
        assert refused(budget).reason == "TENANT_CONCURRENCY_LIMIT"
    with pytest.raises(KeyError), budget.request():
        raise KeyError
    with budget.request():
        pass


def test_tokens_a_minute_may_be_overdrawn_once() -> None:
    clock = Clock()
    budget = Budget("acme", Limits(tokens_per_minute=60), clock)
    with budget.request():
        budget.spend(90)
    error = refused(budget)
    assert (error.reason, error.retry_after) == ("TENANT_TOKEN_RATE_LIMIT", 31.0)
    clock.now = 31.0
    with budget.request():
        pass


def test_a_refused_request_costs_nothing() -> None:
    clock = Clock()
    budget = Budget("acme", Limits(requests_per_second=1), clock)
    with budget.request():
        pass
    for _ in range(5):
        assert refused(budget).retry_after == 1.0


def test_rates_hold_at_both_services(world: World) -> None:
    slow = world.client("slow-reader")
    errors = []
    for _ in range(2):
        try:
            slow.admin("ListAdapters")
            slow.generate(ask())
        except MultiloraError as error:
            errors.append(error)
    assert [error.reason for error in errors][-1] == "TENANT_REQUEST_RATE_LIMIT"
    assert errors[-1].retry_after is not None
    assert 1 < errors[-1].retry_after <= 100
    with httpx.Client(verify=world.tls) as http:
        headers = {"Authorization": f"Bearer {slow.token}"}
        answers = [http.get(f"{world.https}/v1/models", headers=headers) for _ in range(2)]
    assert answers[-1].status_code == 429
    assert 1 < int(answers[-1].headers["Retry-After"]) <= 100
    assert answers[-1].json()["error"]["code"] == "TENANT_REQUEST_RATE_LIMIT"


def test_a_stream_counts_until_it_ends(world: World) -> None:
    busy = world.client("busy-reader")
    stub = inference_pb2_grpc.InferenceServiceStub(busy.channel(world.inference.address))
    with world.inference.held():
        message = ask()
        message.request_id = "first"
        first = stub.Generate(message, metadata=busy.metadata, timeout=60)
        world.inference.wait_in_flight(Caller("busy-reader", Role.READER, "busy").salted("first"))
        with pytest.raises(ResourceExhausted) as raised:
            busy.generate(ask())
        assert raised.value.reason == "TENANT_CONCURRENCY_LIMIT"
        assert raised.value.retry_after == 1.0
        world.client("acme-reader")  # another tenant is none the worse
    assert list(first)[-1].HasField("finished")
    # the answer's last message comes before the server has left the call
    for _ in range(1000):
        try:
            busy.generate(ask())
            break
        except ResourceExhausted:
            continue
    else:
        raise AssertionError("the first request still counts")
    with pytest.raises(grpc.RpcError):
        next(stub.Generate(ask(), timeout=30))  # no token


def test_tokens_are_counted(world: World) -> None:
    frugal = world.client("frugal-reader")
    frugal.generate(ask())
    with pytest.raises(ResourceExhausted) as raised:
        frugal.generate(ask())
    assert raised.value.reason == "TENANT_TOKEN_RATE_LIMIT"


def test_quotas_of_adapters_and_bytes(world: World, adapters: Adapters, tiny_model: Path) -> None:
    small = world.client("small-publisher")
    first = small.register("one", adapters.directory)
    assert first.identity.pack_size < 1_000_000
    with pytest.raises(ResourceExhausted) as raised:
        small.register("two", adapters.directory)
    assert raised.value.reason == "ADAPTER_QUOTA_EXCEEDED"
    assert "small" in raised.value.message
    made = [
        make_random_adapter(world.directory / f"small{seed}", tiny_model, base_model_name_or_path=TINY_BASE, seed=seed)
        for seed in range(20, 20 + 1_000_000 // first.identity.pack_size + 1)
    ]

    def register_all() -> None:
        for directory in made:
            small.register("one", directory)

    with pytest.raises(ResourceExhausted, match="bytes") as raised:
        register_all()
    assert raised.value.reason == "BYTE_QUOTA_EXCEEDED"
    world.client("ops-publisher").register("small/two", adapters.directory)  # an operator is not bound by it
