"""The caller of the call that is being handled, and the adapters that are there for them.

A caller of a tenant sees that tenant's adapters and those of `shared`; of every other name they are told what they
would be told if there were none, before anything is looked up, so that not even the time tells more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from services.common.auth.limits import Budget
from services.common.auth.permissions import Role
from services.common.errors import NotFound, PermissionDenied
from services.common.references import DEFAULT_TENANT, AdapterName, AdapterReference, parse_name, parse_reference

SHARED_TENANT = "shared"
EVERY_TENANT = "*"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. name: of their token or certificate; empty when nobody is asked who they are

    tenant: `*` is every tenant; budget: what is left of the tenant's limits
    """

    name: str
    role: Role
    tenant: str
    budget: Budget | None = None

    @property
    def every_tenant(self) -> bool:
        return self.tenant == EVERY_TENANT

    @property
    def home(self) -> str:
        """The tenant a bare name is of."""
        return DEFAULT_TENANT if self.every_tenant else self.tenant

    @property
    def tenants(self) -> Sequence[str] | None:
        """Whose adapters they see, in order; None: everybody's."""
        return None if self.every_tenant else sorted({self.tenant, SHARED_TENANT})

    def sees(self, tenant: str) -> bool:
        return self.every_tenant or tenant in (self.tenant, SHARED_TENANT)

    def salted(self, text: str) -> str:
        """A cache salt, or a request's id, that no other tenant has; the same where nobody is asked who they are."""
        return f"{len(self.tenant)}:{self.tenant}{text}" if self.name else text


NOBODY = Caller("", Role.ADMIN, EVERY_TENANT)

_caller: ContextVar[Caller] = ContextVar("caller", default=NOBODY)
_authorization: ContextVar[str] = ContextVar("authorization", default="")
_ask_again: ContextVar[Callable[[], object]] = ContextVar("ask_again", default=lambda: None)
_facts: ContextVar[dict[str, Any] | None] = ContextVar("facts", default=None)


def caller() -> Caller:
    """Who calls: of the task that handles the call, and of the threads it waits for."""
    return _caller.get()


def authorization() -> str:
    """What they said to be known by; empty when they did not have to. Not for logs."""
    return _authorization.get()


def enter(
    who: Caller,
    authorization: str | None = None,
    facts: dict[str, Any] | None = None,
    ask_again: Callable[[], object] = lambda: None,
) -> None:
    """From here on this task works for `who`; every call is handled in a task of its own.

    facts: filled by `note`; None where nobody keeps them
    ask_again: raises when they would not be let in now
    """
    _caller.set(who)
    _authorization.set(authorization or "")
    _facts.set(facts)
    _ask_again.set(ask_again)


def check_still_known() -> None:
    """For calls without an end. Raises Unauthenticated once the caller's token has been taken away, or has expired."""
    _ask_again.get()()


def note(**facts: object) -> None:
    """Say in the audit record what this call is about; `outcome`, when it was refused without an error of its own."""
    kept = _facts.get()
    if kept is not None:
        kept |= facts


def adapter_not_found(adapter: AdapterName, *, field: str = "") -> NotFound:
    """What is said of an adapter that is not there, and of one that the caller must not know of."""
    return NotFound(
        "ADAPTER_NOT_FOUND",
        f"there is no adapter {adapter}; register it, or check the name",
        field=field,
        adapter=adapter,
    )


def named(text: str, *, field: str = "adapter") -> AdapterName:
    """The adapter that `text` names, for the caller. Raises InvalidArgument, NotFound."""
    adapter = parse_name(text, tenant=caller().home, field=field)
    if not caller().sees(adapter.tenant):
        raise adapter_not_found(adapter)
    return adapter


def named_to_change(text: str, *, field: str = "adapter") -> AdapterName:
    """The same, which the caller may change. Raises PermissionDenied for a shared one, too."""
    adapter = named(text, field=field)
    check_own(adapter, field=field)
    return adapter


def referenced(text: str, *, field: str = "adapter") -> AdapterReference:
    """What `text` refers to, for the caller. Raises InvalidArgument, NotFound."""
    reference = parse_reference(text, tenant=caller().home, field=field)
    if not caller().sees(reference.adapter.tenant):
        raise adapter_not_found(reference.adapter, field="adapter" if field == "adapter" else "")
    return reference


def check_own(adapter: AdapterName, *, field: str = "adapter") -> None:
    """Raise PermissionDenied unless the caller may change the adapter, or make it."""
    note(adapter=str(adapter))
    if not caller().every_tenant and adapter.tenant != caller().tenant:
        raise PermissionDenied(
            "NOT_YOUR_TENANT",
            f"{field}: {adapter} is of tenant {adapter.tenant}, and you are of {caller().tenant}; ask with a token of "
            f"{adapter.tenant}",
            field=field,
        )
