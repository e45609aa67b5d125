"""Token ids to text, one request at a time: whole characters only, and nothing that may still become a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from services.inference.params import Stopping
from services.inference.tokenizer import Tokenizer


class Detokenizer:
    """Streams the text of one answer and ends it at a stop text.

    num_tokens: ids taken so far; what comes after a stop text is not counted
    stop_match: the stop text that ended the answer, or empty
    """

    def __init__(self, tokenizer: Tokenizer, stopping: Stopping) -> None:
        self._tokenizer = tokenizer
        self._stream = tokenizer.decode_stream()
        self._stops = stopping.stop
        self._include_stop = stopping.include_stop
        self._min_tokens = stopping.min_tokens
        self._last: list[int] = []  # ids of the last text that became certain
        self._uncertain: list[int] = []  # those since
        self._held = ""
        self.num_tokens = 0
        self.stop_match = ""

    def push(self, token_ids: Sequence[int], stop_token_id: int | None = None) -> tuple[str, int]:
        """Take new ids; return the text now certain, and how many of the ids belong to the answer.

        stop_token_id: the last id, when it ended the answer; it counts, and its text is left out as a stop text's is
        """
        released: list[str] = []
        for count, token_id in enumerate(token_ids, start=1):
            self.num_tokens += 1
            if token_id == stop_token_id and count == len(token_ids) and not self._include_stop:
                break
            self._uncertain.append(token_id)
            if text := self._stream(token_id):
                self._last, self._uncertain = self._uncertain, []
                released.append(self._take(text))
            if self.stop_match:
                return "".join(released), count
        return "".join(released), len(token_ids)

    def flush(self) -> str:
        """The rest of the text, once no more ids come: what was held back, and a character left incomplete."""
        if self.stop_match:
            return ""
        rest = self._take(self._tail()) + self._held
        self._held = ""
        return rest

    def _tail(self) -> str:
        """What the uncertain ids are, decoded after those before them: some decoders begin a text in another way."""
        if not self._uncertain:
            return ""
        known, whole = (
            self._tokenizer.decode(ids, skip_special_tokens=True) for ids in (self._last, self._last + self._uncertain)
        )
        return whole.removeprefix(known) if whole.startswith(known) else ""

    def _take(self, text: str) -> str:
        if not self._stops or self.num_tokens <= self._min_tokens:
            return text
        self._held += text
        matches = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if matches:
            at, self.stop_match = min(matches)
            end = at + len(self.stop_match) if self._include_stop else at
            text, self._held = self._held[:end], ""
            return text
        certain = len(self._held) - _longest_beginning(self._held, self._stops)
        text, self._held = self._held[:certain], self._held[certain:]
        return text


def _longest_beginning(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` with which one of `stops` begins."""
    longest = max(map(len, stops)) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
