"""Names and references: what is read, what is refused, and that writing one reads back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidArgument
from services.common.references import AdapterName, AdapterReference, parse_name, parse_reference

NAMES = st.from_regex(r"[a-z0-9]([-a-z0-9._]{0,61}[a-z0-9])?", fullmatch=True)
ADAPTERS = st.builds(AdapterName, NAMES, NAMES)
REFERENCES = st.builds(AdapterReference, ADAPTERS, st.integers(1, 10**18 - 1)) | st.builds(
    AdapterReference, ADAPTERS, alias=NAMES
)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("x", AdapterReference(AdapterName("default", "x"))),
        ("a/x", AdapterReference(AdapterName("a", "x"), alias="stable")),
        ("x@3", AdapterReference(AdapterName("default", "x"), version=3)),
        ("a/x:canary", AdapterReference(AdapterName("a", "x"), alias="canary")),
        ("a.b-c_d/0", AdapterReference(AdapterName("a.b-c_d", "0"))),
    ],
)
def test_references_are_read(text: str, reference: AdapterReference) -> None:
    assert parse_reference(text) == reference


def test_a_bare_name_is_the_callers_tenants() -> None:
    assert parse_name("x", tenant="acme") == AdapterName("acme", "x")
    assert parse_reference("b/x@1", tenant="acme").adapter == AdapterName("b", "x")


@pytest.mark.parametrize(
    "text",
    [
        *("", "X", "-x", "x-", "x\n", "x y", "ü", ".", "..", "x" * 64, "../x", "a/b/c", "/x", "x/"),
        *("x@", "x@0", "x@01", "x@1.0", "x@-1", "x@²", "x@" + "9" * 19, "x@1:a"),
        *("x:", "x:A", "x:a:b", "x:a@1"),
    ],
)
def test_bad_references_name_the_field(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_reference(text, field="model")
    assert caught.value.field == "model"
    assert caught.value.message.startswith("model: ")


@given(REFERENCES)
def test_what_is_written_reads_back(reference: AdapterReference) -> None:
    assert parse_reference(str(reference)) == reference
    assert parse_name(str(reference.adapter)) == reference.adapter


@given(st.text(max_size=80) | st.text(alphabet="ab/:@.-0", max_size=20))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        reference = parse_reference(text)
    except InvalidArgument:
        return
    assert parse_reference(str(reference)) == reference
