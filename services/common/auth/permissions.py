"""The permission table: every RPC and HTTP route, and who may call it. What has no row is refused.

A row of `own` is for callers of any tenant, who see their own adapters and shared ones through it; a row of `fleet` is
for callers of every tenant (`*`) alone: what it does or shows is not one tenant's.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """admin: everything of a tenant; publisher: uploads and moves aliases, and calls; reader: lists and calls;
    replica: what an inference service asks of the store, for every tenant."""

    ADMIN = "admin"
    PUBLISHER = "publisher"
    READER = "reader"
    REPLICA = "replica"


ADMIN, PUBLISHER, READER, REPLICA = Role


@dataclass(frozen=True, slots=True)
class Rule:
    """roles: who may; fleet: of tenant `*` only; changes: stands in the audit record; open: without credentials too"""

    roles: frozenset[Role]
    fleet: bool = False
    changes: bool = False
    open: bool = False


def own(*roles: Role, changes: bool = False) -> Rule:
    return Rule(frozenset(roles), changes=changes)


def fleet(*roles: Role, changes: bool = False) -> Rule:
    return Rule(frozenset(roles), fleet=True, changes=changes)


ANYONE = Rule(frozenset(Role), open=True)

_HEALTH = "/grpc.health.v1.Health"
_STORE = "/multilora.adapter_store.v1.AdapterStoreService"
_ADMIN = "/multilora.adapter_store.v1.AdapterAdminService"
_INFERENCE = "/multilora.inference.v1.InferenceService"
_CONTROL = "/multilora.inference.v1.AdapterControlService"

RULES: dict[str, Rule] = {
    # probes come without credentials, and learn that a service runs
    f"{_HEALTH}/Check": ANYONE,
    f"{_HEALTH}/List": ANYONE,
    f"{_HEALTH}/Watch": ANYONE,
    "GET /health": ANYONE,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": own(*Role),
    # packs are named by digest alone, and changes are every tenant's
    f"{_STORE}/GetBaseModel": own(*Role),
    f"{_STORE}/ResolveAdapter": own(*Role),
    f"{_STORE}/PullAdapter": fleet(ADMIN, REPLICA),
    f"{_STORE}/WatchAdapters": fleet(ADMIN, REPLICA),
    f"{_ADMIN}/RegisterBaseModel": fleet(ADMIN, changes=True),
    f"{_ADMIN}/ListBaseModels": own(*Role),
    f"{_ADMIN}/RegisterVersion": own(ADMIN, PUBLISHER, changes=True),
    # the store's roots hold what any tenant staged there
    f"{_ADMIN}/RegisterFromUri": fleet(ADMIN, PUBLISHER, changes=True),
    f"{_ADMIN}/ValidateVersion": own(ADMIN, PUBLISHER),
    f"{_ADMIN}/GetAdapter": own(*Role),
    f"{_ADMIN}/ListAdapters": own(*Role),
    f"{_ADMIN}/ListVersions": own(*Role),
    f"{_ADMIN}/GetVersion": own(*Role),
    f"{_ADMIN}/DownloadVersion": own(ADMIN, PUBLISHER),
    f"{_ADMIN}/GetHistory": own(ADMIN, PUBLISHER),
    f"{_ADMIN}/SetAlias": own(ADMIN, PUBLISHER, changes=True),
    f"{_ADMIN}/DeleteAlias": own(ADMIN, PUBLISHER, changes=True),
    f"{_ADMIN}/DeleteVersion": own(ADMIN, changes=True),
    f"{_ADMIN}/UndeleteVersion": own(ADMIN, changes=True),
    f"{_ADMIN}/CollectGarbage": fleet(ADMIN, changes=True),
    f"{_ADMIN}/VerifyIntegrity": fleet(ADMIN),
    f"{_ADMIN}/GetStats": fleet(ADMIN),
    f"{_INFERENCE}/Generate": own(ADMIN, PUBLISHER, READER),
    f"{_INFERENCE}/Tokenize": own(ADMIN, PUBLISHER, READER),
    f"{_INFERENCE}/Detokenize": own(ADMIN, PUBLISHER, READER),
    f"{_INFERENCE}/GetModelInfo": own(ADMIN, PUBLISHER, READER),
    f"{_CONTROL}/LoadAdapter": own(ADMIN, PUBLISHER, changes=True),
    f"{_CONTROL}/UnloadAdapter": own(ADMIN, PUBLISHER, changes=True),
    # a pinned adapter keeps a slot from every tenant
    f"{_CONTROL}/PinAdapter": fleet(ADMIN, changes=True),
    f"{_CONTROL}/UnpinAdapter": fleet(ADMIN, changes=True),
    f"{_CONTROL}/ListAdapters": own(ADMIN, PUBLISHER, READER),
    # its counts, and the metrics', tell of others' traffic
    f"{_CONTROL}/GetServerInfo": fleet(ADMIN, READER),
    "GET /metrics": fleet(ADMIN, READER),
    "GET /v1/models": own(ADMIN, PUBLISHER, READER),
    "POST /v1/completions": own(ADMIN, PUBLISHER, READER),
    "POST /v1/chat/completions": own(ADMIN, PUBLISHER, READER),
    "POST /v1/load_lora_adapter": own(ADMIN, PUBLISHER, changes=True),
    "POST /v1/unload_lora_adapter": own(ADMIN, PUBLISHER, changes=True),
}


def may(rule: Rule, role: Role, *, every_tenant: bool) -> bool:
    """Whether a caller of this role, of one tenant or of every tenant, may call what the rule is about."""
    return rule.open or (role in rule.roles and (every_tenant or not rule.fleet))
