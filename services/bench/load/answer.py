"""What came back for one request, and when: the only thing that a run keeps of it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Answer:
    """Times are seconds of one monotonic clock.

    pieces: when each piece with generated tokens came
    num_input, num_output: tokens, as the server counts them
    tier, version: where the adapter was when the request came, and which one it was, if the server says so
    error: empty when it was answered to its end, else a stable reason
    """

    adapter: str
    sent: float
    ended: float = 0.0
    pieces: list[float] = field(default_factory=list)
    num_input: int = 0
    num_output: int = 0
    tier: str = ""
    version: int = 0
    error: str = ""

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.pieces[0] - self.sent

    @property
    def e2el(self) -> float:
        """Seconds from end to end."""
        return self.pieces[-1] - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None when there is no other."""
        return (self.e2el - self.ttft) / (self.num_output - 1) if self.num_output > 1 else None

    @property
    def itls(self) -> list[float]:
        """Seconds between pieces."""
        return [after - before for before, after in zip(self.pieces, self.pieces[1:], strict=False)]
