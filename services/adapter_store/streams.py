"""Names of the log's streams, and what applying an entry writes to the index: shared by every index backend."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from services.adapter_store.index.interface import Write
from services.adapter_store.log.entry import Entry, VersionAdded, content_fields, subject
from services.adapter_store.log.fold import AdapterState, fold_adapter, fold_base_model
from services.common.errors import DataLoss
from services.common.profile import BaseModelProfile
from services.common.references import AdapterName

ADAPTERS = "adapters/"
BASE_MODELS = "base_models/"

State = AdapterState | BaseModelProfile | None


def adapter_stream(name: AdapterName) -> str:
    return f"{ADAPTERS}{name}"


def base_model_stream(name: str) -> str:
    return f"{BASE_MODELS}{name}"


def adapter_of(stream: str) -> AdapterName:
    tenant, _, name = stream.removeprefix(ADAPTERS).partition("/")
    return AdapterName(tenant, name)


def load_state(stream: str, state: str | None) -> State:
    """A stream's state from the index's text; of a stream without entries, what its first entry folds into."""
    if stream.startswith(ADAPTERS):
        return AdapterState() if state is None else AdapterState.from_json(state)
    if stream.startswith(BASE_MODELS):
        return None if state is None else BaseModelProfile.from_json(state)
    raise DataLoss("LOG_STREAM_UNKNOWN", f"the log has a stream {stream}, which is not known here; run a newer store")


def fold(state: State, entry: Entry) -> State:
    return fold_adapter(state, entry) if isinstance(state, AdapterState) else fold_base_model(entry)


@dataclass(frozen=True, slots=True)
class ChangeRecord:
    """What the feed says of an entry: its kind, and the version or alias it is about."""

    kind: str
    seq: int
    at_ns: int
    actor: str
    version: int
    alias: str

    @classmethod
    def from_json(cls, text: str) -> ChangeRecord:
        return cls(**json.loads(text))


def index_write(stream: str, seq: int, entry: Entry, state: State) -> Write:
    """What applying an entry changes; `state` is the stream's after it."""
    assert state is not None
    text, body = state.to_json(), entry.body
    version, alias, _ = subject(body)
    record = ChangeRecord(body.kind, seq, entry.at_ns, entry.actor, version, alias)
    change = json.dumps(asdict(record), separators=(",", ":"))
    live = len(state.live) if isinstance(state, AdapterState) else 0
    if not isinstance(body, VersionAdded):
        return Write(stream, seq, text, change, live=live)
    fields = content_fields(body.content)
    modules = fields.pop("modules")
    key = str(body.number)
    documents = {key: json.dumps(fields), modules_key(key): json.dumps(modules, separators=(",", ":"))}
    return Write(stream, seq, text, change, documents, (body.content.pack_digest,), live)


def modules_key(key: str) -> str:
    return f"{key}/modules"
