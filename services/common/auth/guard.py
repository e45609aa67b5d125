"""At the door of both services: who calls, whether they may, within their tenant's limits, and for the record.

A bad token costs what a good one does, and its caller's address is told to wait once it has sent several. Good tokens
from the same address pass: nobody finds 256 bits by trying, and a proxy's one bad client must not lock out the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from services.common.auth.audit import Audit
from services.common.auth.callers import EVERY_TENANT, NOBODY, Caller, enter
from services.common.auth.limits import Bucket
from services.common.auth.permissions import RULES, Role, Rule, may
from services.common.auth.tokens import Tokens
from services.common.errors import MultiloraError, PermissionDenied, ResourceExhausted, Unauthenticated

FAILURES_AT_ONCE = 10
FAILURES_PER_SECOND = 1.0
MAX_PEERS = 1024
AUTHORIZATION = "authorization"

log = logging.getLogger(__name__)


class Guard:
    """tokens: None asks for none; certificates: whether every client has shown one that a CA of ours signed"""

    def __init__(self, tokens: Tokens | None, audit: Audit | None, *, certificates: bool) -> None:
        self.tokens = tokens
        self._audit = audit
        self._certificates = certificates
        self._failures: OrderedDict[str, Bucket] = OrderedDict()

    @contextlib.contextmanager
    def call(
        self,
        key: str,
        authorization: str | None,
        peer: Callable[[], str],
        names: Callable[[], Sequence[str]],
        facts: Callable[[], dict[str, Any]] = dict,
    ) -> Iterator[None]:
        """One call, begun and ended within the context. Raises what refuses it.

        key: of the permission table; names: those in the client's certificate; facts: what a change is about
        """
        rule = RULES.get(key)
        if rule is not None and rule.open:
            yield
            return
        ask = partial(self._who, authorization, peer, names)
        who = ask()
        if rule is None:
            raise PermissionDenied("NOT_PERMITTED", f"{key} has no row in the permission table")
        if self._audit is None or not rule.changes:
            _check(rule, key, who)
            enter(who, authorization, ask_again=ask)
            with contextlib.nullcontext() if who.budget is None else who.budget.request():
                yield
            return
        with self._recorded(self._audit, key, who, peer(), facts()) as kept:
            _check(rule, key, who)
            enter(who, authorization, kept, ask)
            with contextlib.nullcontext() if who.budget is None else who.budget.request():
                yield

    def _who(self, authorization: str | None, peer: Callable[[], str], names: Callable[[], Sequence[str]]) -> Caller:
        if self.tokens is None:
            if not self._certificates:
                return NOBODY
            # who may call is for the CA to say; they all may do everything
            return Caller(next(iter(names()), "certificate"), Role.ADMIN, EVERY_TENANT)
        found = None
        if authorization is not None:
            scheme, _, token = authorization.partition(" ")
            found = self.tokens.by_token(token.strip() if scheme.lower() == "bearer" else "")
        elif self._certificates:
            found = self.tokens.by_certificate(list(names()))
        if found is None:
            raise self._refusal(peer(), given=authorization is not None)
        return found

    def _refusal(self, peer: str, *, given: bool) -> MultiloraError:
        failures = self._failures.pop(peer, None) or Bucket(FAILURES_PER_SECOND, FAILURES_AT_ONCE)
        self._failures[peer] = failures
        while len(self._failures) > MAX_PEERS:
            self._failures.popitem(last=False)
        if seconds := failures.wait():
            return ResourceExhausted(
                "TOO_MANY_BAD_TOKENS",
                "this address has sent too many calls without a token that is known; look at the token, then try again",
                retry_after=seconds,
            )
        failures.draw()
        what = "a token that is not known, or has expired" if given else "no token"
        log.warning("a call from %s came with %s", peer, what)
        return Unauthenticated(
            "BAD_TOKEN" if given else "NO_TOKEN",
            f"the call came with {what}; send `authorization: Bearer TOKEN`, as `multilora tokens create` makes them",
        )

    @contextlib.contextmanager
    def _recorded(
        self, audit: Audit, key: str, who: Caller, peer: str, facts: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        outcome = "INTERNAL"
        try:
            yield facts
            outcome = facts.pop("outcome", "OK")
        except MultiloraError as error:
            outcome = error.reason
            raise
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "CANCELLED"
            raise
        finally:
            audit.write(who, peer, key, outcome, facts)


def _check(rule: Rule, key: str, who: Caller) -> None:
    if may(rule, who.role, every_tenant=who.every_tenant):
        return
    if who.role in rule.roles:
        raise PermissionDenied(
            "EVERY_TENANT_ONLY",
            f"{key} is not about one tenant; it takes a token of tenant `*`, and {who.name!r} is of {who.tenant}",
        )
    raise PermissionDenied(
        "ROLE_NOT_PERMITTED",
        f"{key} takes the role {' or '.join(sorted(rule.roles))}; {who.name!r} has {who.role}",
        role=who.role,
    )


def host_of(peer: str) -> str:
    """The address of gRPC's `ipv4:10.0.0.1:4711`, without the port, which every connection has another of."""
    _, _, rest = peer.partition(":")
    host, _, _ = rest.rpartition(":")
    return host.removeprefix("%5B").removesuffix("%5D") or peer
