"""The permission table is whole, and both services keep to it: every call there is, as every kind of caller."""

from __future__ import annotations

from typing import Any, cast

import grpc
import httpx
import pytest

from services.common.auth.permissions import RULES, Role, Rule, may
from services.common.call_metrics import CallCounts
from services.common.errors import MultiloraError
from services.common.rpc import from_rpc_error
from services.inference.http.app import create_app
from tests.common.auth.conftest import World
from tests.common.auth.every_call import METHODS, refusal_of

REFUSED = ("ROLE_NOT_PERMITTED", "EVERY_TENANT_ONLY", "NO_TOKEN", "BAD_TOKEN", "TOO_MANY_BAD_TOKENS")
CALLERS = [(tenant, role) for tenant in ("acme", "ops") for role in Role if (tenant, role) != ("acme", Role.REPLICA)]


def routes() -> set[str]:
    app = create_app(cast(Any, None), cast(Any, None), CallCounts())
    found = [(method, cast(Any, route).path) for route in app.routes for method in cast(Any, route).methods]
    return {f"{method} {path}" for method, path in found if method != "HEAD"}


def test_every_call_has_a_row_and_every_row_a_call() -> None:
    assert set(RULES) == set(METHODS) | routes(), "add the call's row to services/common/auth/permissions.py"


def test_who_changes_is_admin_or_publisher() -> None:
    for key, rule in RULES.items():
        if rule.changes:
            assert rule.roles <= {Role.ADMIN, Role.PUBLISHER}, key


@pytest.mark.parametrize("tenant_and_role", [*CALLERS, None], ids=str)
def test_both_services_keep_to_the_table(world: World, tenant_and_role: tuple[str, Role] | None) -> None:
    token = world.tokens["{}-{}".format(*tenant_and_role)] if tenant_and_role else ""
    with httpx.Client(verify=world.tls) as http:
        for key, rule in RULES.items():
            refused = refusal_of(world, http, key, token)
            assert (refused not in REFUSED) == _expected(rule, tenant_and_role), f"{key}: {refused}"


def _expected(rule: Rule, who: tuple[str, Role] | None) -> bool:
    return rule.open if who is None else may(rule, who[1], every_tenant=who[0] == "ops")


@pytest.mark.parametrize("path", ["/metrics/", "/Metrics", "//metrics", "/v1/../metrics", "/docs"])
def test_a_path_that_is_no_route_is_refused(world: World, path: str) -> None:
    with httpx.Client(verify=world.tls) as http:
        headers = {"Authorization": f"Bearer {world.tokens['acme-reader']}"}
        assert http.get(f"{world.https}{path}", headers=headers).status_code in (403, 404)
        assert http.head(f"{world.https}/metrics", headers=headers).status_code == 403


def test_administration_is_not_at_the_other_port(world: World) -> None:
    client = world.client("ops-admin")
    for address, key in (
        (world.store, "/multilora.adapter_store.v1.AdapterAdminService/GetStats"),
        (world.inference.address, "/multilora.inference.v1.AdapterControlService/ListAdapters"),
    ):
        with pytest.raises(grpc.RpcError) as raised:
            client.channel(address).unary_unary(key)(b"", metadata=client.metadata, timeout=30)
        assert from_rpc_error(raised.value).code == "UNIMPLEMENTED"


def test_a_bad_token_is_told_to_wait_and_a_good_one_is_not(world: World) -> None:
    client = world.client("acme-reader")
    good, client.token = client.token, "mlt_" + "x" * 43

    def reason() -> MultiloraError:
        with pytest.raises(MultiloraError) as raised:
            client.admin("ListAdapters")
        return raised.value

    errors = [reason() for _ in range(30)]
    assert errors[-1].reason == "TOO_MANY_BAD_TOKENS"
    assert errors[-1].retry_after is not None and errors[-1].retry_after > 0
    assert {error.code for error in errors} <= {"UNAUTHENTICATED", "RESOURCE_EXHAUSTED"}
    client.token = good
    client.admin("ListAdapters")
