"""Any sequence of calls on either index, from two processes' handles, against a plain model of what it then says."""

from __future__ import annotations

import secrets
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from services.adapter_store.index.interface import Index, Position, Stored, Totals, Write
from tests.contracts.index_racer import open_at
from tests.contracts.redis_server import RedisServer

FEED = 4
STREAMS = ["adapters/a/x", "adapters/a/y", "adapters/a-b/x", "adapters/b/x", "base_models/m", "base_models/x"]
streams, texts, which = st.sampled_from(STREAMS), st.text(max_size=5), st.integers(0, 1)


@dataclass
class Model:
    """All of an index, as plain data."""

    states: dict[str, Stored] = field(default_factory=dict)
    live: dict[str, int] = field(default_factory=dict)
    documents: dict[tuple[str, str], str] = field(default_factory=dict)
    packs: set[str] = field(default_factory=set)
    feed: list[tuple[int, str, str]] = field(default_factory=list)
    revision: int = 0

    def next_seq(self, stream: str) -> int:
        return self.states[stream].seq + 1 if stream in self.states else 1

    def apply(self, write: Write) -> int | None:
        if write.seq != self.next_seq(write.stream):
            return None
        self.states[write.stream] = Stored(write.seq, write.state)
        self.live[write.stream] = write.live
        self.documents |= {(write.stream, key): document for key, document in write.documents.items()}
        self.packs |= set(write.packs)
        self.revision += 1
        self.feed = [*self.feed, (self.revision, write.stream, write.change)][-FEED:]
        return self.revision

    def totals(self) -> Totals:
        base_models = sum(stream.startswith("base_models/") for stream in self.states)
        return Totals(sum(live > 0 for live in self.live.values()), sum(self.live.values()), base_models)

    def changes(self, after: int) -> list[tuple[int, str, str]] | None:
        if after == self.revision:
            return []
        if after > self.revision or not self.feed or after + 1 < self.feed[0][0]:
            return None
        return [change for change in self.feed if change[0] > after]


class IndexMachine(RuleBasedStateMachine):
    server: RedisServer | None

    @initialize()
    def open(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.prefix = f"test-{secrets.token_hex(8)}"
        place = [self.server.url(), self.prefix] if self.server else [str(Path(self.directory.name) / "index")]
        self.handles = [open_at(*place, feed_length=FEED) for _ in range(2)]
        self.model = Model()
        self.epoch = self.handles[0].position().epoch

    def teardown(self) -> None:
        if not hasattr(self, "handles"):
            return
        for handle in self.handles:
            handle.close()
        if self.server:
            with self.server.admin() as admin:
                admin.unlink(*admin.scan_iter(f"{{{self.prefix}}}:*"))
        self.directory.cleanup()

    def write(self, stream: str, skew: int, text: str, live: int) -> Write:
        seq = max(1, self.model.next_seq(stream) + skew)
        is_adapter = stream.startswith("adapters/")
        documents = {f"{seq}": text, f"{seq}/modules": "[]"} if is_adapter else {}
        packs = [f"sha256:{live}"] if is_adapter else []
        return Write(stream, seq, f'{{"{text}"', f"{text} {seq}", documents, packs, live if is_adapter else 0)

    @rule(which=which, stream=streams, skew=st.sampled_from([0, 0, 0, -1, 1]), text=texts, live=st.integers(0, 3))
    def apply(self, which: int, stream: str, skew: int, text: str, live: int) -> None:
        write = self.write(stream, skew, text, live)
        assert self.handles[which].apply(write) == self.model.apply(write)

    @rule(which=which, stale=st.booleans())
    def renew(self, which: int, stale: bool) -> None:
        position = self.handles[which].renew("another" if stale else self.epoch)
        assert (position.epoch == self.epoch) == stale
        if not stale:
            self.epoch, self.model.feed = position.epoch, []

    @rule(which=which, fails=st.booleans(), entries=st.lists(st.tuples(streams, texts, st.integers(0, 3)), max_size=5))
    def rebuild(self, which: int, fails: bool, entries: list[tuple[str, str, int]]) -> None:
        before, self.model = self.model, Model()
        try:
            with self.handles[which].rebuild() as writer:
                for entry in entries:
                    write = self.write(entry[0], 0, *entry[1:])
                    assert writer.apply(write) == self.model.apply(write)
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            self.model = before
        else:
            position = self.handles[1 - which].position()
            assert position.epoch != self.epoch
            self.epoch = position.epoch

    @invariant()
    def says_what_the_model_says(self) -> None:
        if not hasattr(self, "handles"):
            return
        for index in self.handles:
            self.check(index)

    def check(self, index: Index) -> None:
        model = self.model
        assert index.position() == Position(self.epoch, model.revision)
        assert not index.suspect()
        assert dict(index.seqs()) == {stream: stored.seq for stream, stored in model.states.items()}
        assert index.scan("", "", 100) == sorted(model.states.items(), key=lambda item: item[0].encode())
        in_a = sorted(stream for stream in model.states if stream.startswith("adapters/a/"))
        assert [stream for stream, _ in index.scan("adapters/a/", "adapters/a/x", 9)] == [
            stream for stream in in_a if stream > "adapters/a/x"
        ]
        assert index.totals() == model.totals()
        for stream in STREAMS:
            assert index.get(stream) == model.states.get(stream)
            keys = ["1", "1/modules", "2", "none"]
            assert index.documents(stream, keys) == {
                key: model.documents[stream, key] for key in keys if (stream, key) in model.documents
            }
        named = [stream for stream in sorted(model.states) if stream.startswith("adapters/") and stream.endswith("/x")]
        assert index.named("x") == (named[0] if named else None)
        assert [index.has_pack(f"sha256:{n}") for n in range(4)] == [f"sha256:{n}" in model.packs for n in range(4)]
        for after in range(max(0, model.revision - FEED - 2), model.revision + 2):
            found = index.changes(after, 100)
            told = None if found is None else [(change.revision, change.stream, change.change) for change in found]
            assert told == model.changes(after)


@pytest.mark.parametrize("backend", ["sqlite", "redis"])
def test_any_calls(backend: str, request: pytest.FixtureRequest) -> None:
    class Machine(IndexMachine):
        server = request.getfixturevalue("redis_server") if backend == "redis" else None

    run_state_machine_as_test(Machine, settings=settings(max_examples=25, stateful_step_count=20, deadline=None))  # type: ignore[no-untyped-call]
