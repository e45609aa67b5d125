"""What is fuzzed: each parser of bytes that strangers send, the errors it documents, and valid bytes to begin with.

A target gets any bytes. It may answer, or raise what it documents; whatever else it raises is a finding.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass

from services.adapter_store.findings import Findings
from services.adapter_store.log.entry import AliasSet, BaseModelSet, Entry, VersionAdded, VersionDeleted, decode, encode
from services.adapter_store.manifest import parse_manifest
from services.adapter_store.records import BoundModule, VersionContent
from services.adapter_store.safetensors_header import HeaderError, parse_header
from services.adapter_store.streams import base_model_stream, fold, index_write, load_state
from services.common.errors import DataLoss, FailedPrecondition, InvalidArgument
from services.common.packed import PackedHeader, PackedLayer, PackedModule, decode_header, encode_header
from services.common.profile import profile_from_config
from services.common.references import parse_reference
from services.common.split import Target
from tests.adapter_store.uploads import CONFIG_FILE, MODEL_CONFIG, WEIGHTS_FILE, make_adapter
from tests.fuzz.mutation import framed, mutate_json

# A module's name as an adapter's tensors give it: what a config's patterns are matched with.
_MODULE = "model.layers.11.self_attn.q_proj"
_MAX_MESSAGE_CHARS = 1 << 14
_DIGEST = f"sha256:{'0' * 64}"
# Of an adapter with versions 1 and 2, to which entries are applied.
_STATE = json.dumps({"versions": [["a", "tiny", 1, None, False], ["b", "tiny", 1, None, False]], "aliases": {}})


@dataclass(frozen=True)
class Fuzzed:
    """errors: what the parser documents; seeds: valid inputs; dictionary: words of the format.

    mutate: an input, and a number to choose by, to another input of the same frame
    """

    parse: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]
    dictionary: tuple[str, ...]
    max_bytes: int = 1 << 14
    mutate: Callable[[bytes, int], bytes] = mutate_json

    def __call__(self, data: bytes) -> None:
        try:
            self.parse(data)
        except self.errors as error:
            if len(str(error)) > _MAX_MESSAGE_CHARS:
                raise ValueError("an error's message repeats what was sent") from error


def _safetensors(data: bytes) -> None:
    for tensor in parse_header(memoryview(data)).values():
        assert 0 <= tensor.begin <= tensor.end <= len(data)


def _config(data: bytes) -> None:
    findings = Findings()
    manifest = parse_manifest(data, findings)
    assert manifest is not None or findings, "refused without a reason"
    findings.raise_if_any()
    assert manifest is not None
    rank, _ = manifest.rank_and_scale(_MODULE)
    assert rank >= 1


def _packed(data: bytes) -> None:
    header, payload = decode_header(data, len(data))
    assert payload + header.payload_size == len(data)
    assert all(module.rank <= header.max_rank for module in header.modules)
    # what is accepted can be written again
    decode_header(encode_header(header), len(encode_header(header)) + header.payload_size)


def _log_entry(data: bytes) -> None:
    entry = decode(data, "adapters/acme/x/1")
    again = encode(entry)
    assert encode(decode(again, "again")) == again
    stream = base_model_stream("tiny") if isinstance(entry.body, BaseModelSet) else "adapters/acme/x"
    index_write(stream, 1, entry, fold(load_state(stream, _STATE if stream.startswith("adapters") else None), entry))


def _reference(data: bytes) -> None:
    text = data.decode("utf-8", errors="surrogateescape")
    reference = parse_reference(text)
    assert parse_reference(str(reference)) == reference


def _packed_seeds() -> list[bytes]:
    module = PackedModule("model.layers.0.mlp.up_proj", 0, 2, 0.5, "float32", 16, 16, 0, 128)
    header = PackedHeader(_DIGEST, "tiny", (PackedLayer(0, 0, 256, "00000000"),), (module,))
    return [encode_header(header) + b"\0" * 256]


def _entry_seeds() -> list[bytes]:
    content = VersionContent(
        *(_DIGEST,) * 4, 4096, "tiny", 4, 100, "float32", ("a warning",), (BoundModule(_MODULE, 4, 0.5),)
    )
    profile = profile_from_config("tiny", json.dumps(MODEL_CONFIG))
    bodies = (
        VersionAdded(3, content, stable=True),
        AliasSet("canary", (Target(1, 9), Target(2))),
        VersionDeleted(1),
        BaseModelSet(profile),
    )
    return [encode(Entry(body, 10**18, "jane", "0" * 32)) for body in bodies]


def _files(name: str) -> list[bytes]:
    patterns = {"rank_pattern": {"layers.[01].*q_proj": 4}, "alpha_pattern": {"q_proj": 16.0}}
    return [make_adapter(rank=1).files()[name], make_adapter(use_rslora=True, **patterns).files()[name]]


TARGETS = {
    "safetensors": Fuzzed(
        _safetensors,
        (HeaderError,),
        lambda: _files(WEIGHTS_FILE),
        ("__metadata__", "dtype", "shape", "data_offsets", "BF16", "F32", "[0,4]", "{}", "9223372036854775807"),
        mutate=framed(struct.Struct("<Q"), 1),
    ),
    "config": Fuzzed(
        _config,
        (InvalidArgument, FailedPrecondition),
        lambda: _files(CONFIG_FILE),
        ("peft_type", "LORA", "rank_pattern", "alpha_pattern", "use_rslora", "lora_alpha", "NaN", "1e999", "null"),
    ),
    "packed": Fuzzed(
        _packed,
        (DataLoss,),
        _packed_seeds,
        ("MLORAPAK", "layers", "modules", "scale", "rank", "1e999", "-1", "4096"),
        mutate=framed(struct.Struct("<8sII"), 4096),
    ),
    "log_entry": Fuzzed(
        _log_entry, (DataLoss,), _entry_seeds, ("format", "kind", "version", "alias", "targets", "content", "modules")
    ),
    "reference": Fuzzed(
        _reference,
        (InvalidArgument,),
        lambda: [b"acme/x", b"x@3", b"acme/x:canary", b"x:latest"],
        ("@", ":", "/", "latest", "stable", "0"),
        max_bytes=256,
    ),
}


def dictionary(target: Fuzzed) -> str:
    """As libFuzzer reads it."""
    return "".join(f"{json.dumps(word)}\n" for word in target.dictionary)
