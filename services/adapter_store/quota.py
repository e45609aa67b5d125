"""What a tenant may keep in the store."""

from __future__ import annotations

from dataclasses import dataclass

from services.common.auth.callers import caller
from services.common.errors import ResourceExhausted


@dataclass(frozen=True, slots=True)
class Usage:
    """adapters: those with a version that is not collected; bytes: of such versions, packed"""

    adapters: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Quota:
    """0 is no limit. What several uploads bring at the same moment may together go beyond it."""

    tenant: str
    max_adapters: int = 0
    max_bytes: int = 0

    def check(self, usage: Usage, *, new_adapter: bool, more_bytes: int) -> None:
        """Raise ResourceExhausted when this much more would be too much."""
        if self.max_adapters and new_adapter and usage.adapters >= self.max_adapters:
            raise self._exceeded("ADAPTER_QUOTA", f"{usage.adapters} of {self.max_adapters} adapters")
        if self.max_bytes and usage.bytes + more_bytes > self.max_bytes:
            raise self._exceeded("BYTE_QUOTA", f"{usage.bytes} of {self.max_bytes} bytes, and {more_bytes} would come")

    def _exceeded(self, reason: str, what: str) -> ResourceExhausted:
        return ResourceExhausted(
            f"{reason}_EXCEEDED",
            f"tenant {self.tenant} has {what}; delete versions, which count until they are collected, or have the "
            "quota raised",
            tenant=self.tenant,
        )


def callers_quota() -> Quota | None:
    """None for callers of every tenant, and where there is no quota."""
    budget = caller().budget
    if budget is None or not (budget.limits.max_adapters or budget.limits.max_bytes):
        return None
    return Quota(budget.tenant, budget.limits.max_adapters, budget.limits.max_bytes)
