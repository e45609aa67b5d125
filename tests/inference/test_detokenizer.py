"""Text as it streams: whole characters, nothing that may yet become a stop text, and nothing lost at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.inference.detokenizer import Detokenizer
from services.inference.params import Stopping
from services.inference.tokenizer import Tokenizer

FIRST_BYTE = 3
"""Ids of the 256 single bytes start here, after the special tokens."""

ids_of_any_kind = st.lists(
    st.one_of(st.integers(0, 511), st.integers(FIRST_BYTE, FIRST_BYTE + 255)), min_size=1, max_size=30
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.load(tiny_model, frozenset({2}))


def stream(tokenizer: Tokenizer, ids: list[int], stopping: Stopping) -> tuple[list[str], Detokenizer]:
    """Push ids one by one until a stop text matches; the pieces of text."""
    detokenizer = Detokenizer(tokenizer, stopping)
    pieces = []
    for token_id in ids:
        text, used = detokenizer.push([token_id])
        assert used == 1
        pieces.append(text)
        if detokenizer.stop_match:
            break
    pieces.append(detokenizer.flush())
    return pieces, detokenizer


@given(ids=ids_of_any_kind)
@settings(max_examples=300, deadline=None)
def test_the_pieces_make_the_whole(tokenizer: Tokenizer, ids: list[int]) -> None:
    pieces, detokenizer = stream(tokenizer, ids, Stopping())
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert detokenizer.num_tokens == len(ids)


@given(text=st.text(max_size=20))
@settings(max_examples=150, deadline=None)
def test_a_character_never_comes_in_parts(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("\ufffd", "")
    ids = [FIRST_BYTE + byte_rank(byte) for byte in text.encode()]
    pieces, _ = stream(tokenizer, ids, Stopping())
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def byte_rank(byte: int) -> int:
    """Where the byte-level alphabet, sorted by its stand-in characters, has this byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [other for other in range(256) if other not in shown]
    return shown.index(byte) if byte in shown else len(shown) + hidden.index(byte)


@given(data=st.data(), ids=ids_of_any_kind, include_stop=st.booleans())
@settings(max_examples=300, deadline=None)
def test_stop_texts(tokenizer: Tokenizer, data: st.DataObject, ids: list[int], include_stop: bool) -> None:
    """Stop texts cut out of the answer itself, so that they lie across any token border."""
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    stops = data.draw(st.lists(st.text("abe xyé", min_size=1, max_size=4), max_size=2))
    for _ in range(data.draw(st.integers(0, 2))):
        if whole:
            start = data.draw(st.integers(0, len(whole) - 1))
            stops.append(whole[start : start + data.draw(st.integers(1, 6))])
    stops = [stop for stop in stops if "\ufffd" not in stop]
    pieces, detokenizer = stream(tokenizer, ids, Stopping(stop=tuple(stops), include_stop=include_stop))
    text = "".join(pieces)
    assert whole.startswith(text)
    assert bool(detokenizer.stop_match) == any(stop in whole for stop in stops)
    if not detokenizer.stop_match:
        assert text == whole
        return
    before = text.removesuffix(detokenizer.stop_match) if include_stop else text
    assert whole.startswith(before + detokenizer.stop_match)
    assert not any(stop in before for stop in stops), "an earlier match was passed over"
    assert pieces[-1] == ""


@given(ids=ids_of_any_kind, stop=st.text("ab é", min_size=2, max_size=5))
@example(ids=[FIRST_BYTE + byte_rank(byte) for byte in b"xxabababac"], stop="ababac")
@settings(max_examples=100, deadline=None)
def test_what_may_become_a_stop_text_is_held_back(tokenizer: Tokenizer, ids: list[int], stop: str) -> None:
    detokenizer, sent, decoded = Detokenizer(tokenizer, Stopping(stop=(stop,))), "", tokenizer.decode_stream()
    whole = ""
    for token_id in ids:
        sent += detokenizer.push([token_id])[0]
        whole += decoded(token_id)
        if detokenizer.stop_match:
            assert sent == whole[: whole.index(stop)]
            return
        held = whole[len(sent) :]
        assert whole.startswith(sent) and stop.startswith(held), "only the beginning of the stop text is held back"
        assert not any(
            stop.startswith(whole[-length:]) for length in range(len(held) + 1, min(len(stop), len(whole) + 1))
        )


def test_no_stop_text_counts_within_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the boats")
    pieces, detokenizer = stream(tokenizer, ids * 2, Stopping(stop=("the boats",), min_tokens=len(ids)))
    assert ("".join(pieces), detokenizer.stop_match) == ("the boats", "the boats")
    assert detokenizer.num_tokens == 2 * len(ids)


def test_ids_after_a_match_are_no_part_of_the_answer(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, Stopping(stop=("b",)))
    ids = [FIRST_BYTE + byte_rank(byte) for byte in b"abc"]
    assert detokenizer.push(ids) == ("a", 2)
    assert (detokenizer.stop_match, detokenizer.num_tokens) == ("b", 2)


@pytest.mark.parametrize(("include_stop", "text"), [(False, "a"), (True, "ab")])
def test_a_stop_ids_text(tokenizer: Tokenizer, include_stop: bool, text: str) -> None:
    first, last = (FIRST_BYTE + byte_rank(byte) for byte in b"ab")
    detokenizer = Detokenizer(tokenizer, Stopping(include_stop=include_stop))
    found, used = detokenizer.push([first, last], stop_token_id=last)
    assert (found + detokenizer.flush(), used, detokenizer.num_tokens) == (text, 2, 2)
