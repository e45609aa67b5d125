"""The one order statistic of the benchmarks: the standard library alone, as those of a bare GPU image need it."""

from __future__ import annotations

from collections.abc import Sequence


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least `share` of them do not exceed."""
    return sorted(values)[max(0, -(-int(share * 10_000) * len(values) // 10_000) - 1)]
