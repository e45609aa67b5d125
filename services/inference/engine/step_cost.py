"""What a step will cost, learned from the steps there were, so that a prompt's share of a step can be bounded by time.

A long prompt beside decodes makes everyone wait for the whole step. The token budget bounds memory; this bounds time,
whatever the machine and whatever ranks its adapters have: both are in what was measured.
"""

from __future__ import annotations

MIN_PROMPT_TOKENS = 64
"""The least a step gives to prompts, however slow: below it the weights are read for too few rows to be worth it."""

SMOOTHING = 0.2
"""Share of the newest step in an average: five steps to forget a disturbance."""


class StepCost:
    """`seconds(step) = decode_seconds[rows] + prompt_tokens * seconds_per_prompt_token`, both running averages.

    target: seconds a step may take
    """

    def __init__(self, target: float) -> None:
        self.target = target
        self._decode_seconds: dict[int, float] = {}
        self._per_prompt_token = 0.0

    def observe(self, decode_rows: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step. Rows are bucketed by powers of two."""
        if not prompt_tokens:
            bucket = decode_rows.bit_length()
            self._decode_seconds[bucket] = _average(self._decode_seconds.get(bucket, seconds), seconds)
        elif prompt_tokens >= MIN_PROMPT_TOKENS // 2:
            each = max(0.0, seconds - self._decode(decode_rows)) / prompt_tokens
            self._per_prompt_token = _average(self._per_prompt_token or each, each)

    def prompt_budget(self, decode_rows: int) -> int | None:
        """Prompt tokens that fit the target beside these decodes; None while nothing is known of them."""
        if not self._per_prompt_token:
            return None
        left = self.target - self._decode(decode_rows)
        return max(MIN_PROMPT_TOKENS, int(left / self._per_prompt_token))

    def _decode(self, rows: int) -> float:
        """The nearest bucket that was seen at or below `rows`, else above; 0 before any."""
        if not rows or not self._decode_seconds:
            return 0.0
        wanted = rows.bit_length()
        return self._decode_seconds[
            min(self._decode_seconds, key=lambda bucket: (bucket > wanted, abs(bucket - wanted)))
        ]


def _average(before: float, newest: float) -> float:
    return before + SMOOTHING * (newest - before)
