"""Random sequences of everything a store does, on every pair of backends, against a model of a few dictionaries.

Two stores share each place, as two processes do, and any of them is asked. After every step all answers are the
model's, everything verifies, the history is whole, and the feed of changes tells what happened and nothing else.
The examples are the same at every run; MULTILORA_MODEL_EXAMPLES=500 runs that many others.
"""

# ruff: noqa: ARG002 -- operations are drawn by name and called alike
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from services.adapter_store import records
from services.adapter_store.log.entry import subject
from services.adapter_store.store import AdapterStore
from services.common.errors import MultiloraError, Unavailable
from services.common.profile import profile_from_config
from services.common.references import AdapterName, parse_name, parse_reference
from services.common.split import Target
from tests.adapter_store.uploads import BASE_MODEL, MAX_RANK, MODEL_CONFIG, make_adapter
from tests.contracts.store_model import DELETE_GRACE_NS, Content, Model, Refused
from tests.contracts.store_model_places import COMBINATIONS, Servers

EXAMPLES = int(os.environ.get("MULTILORA_MODEL_EXAMPLES", "0"))
# (examples, steps): what takes some 10 s each
SIZES = {"disk+sqlite": (18, 40), "disk+redis": (10, 40), "s3+sqlite": (3, 30), "s3+redis": (3, 30)}
PROCESSES = 2
# Few, so that they meet. The third is no adapter's.
NAMES = ("acme/x", "acme/y", "beta/x")
ALIASES = ("stable", "canary", "blue")
MANY = 1000


def make_content(key: str, seed: int, **config: Any) -> Content:
    files = make_adapter(seed=seed, rank=1, modules=("self_attn.k_proj",), layers=(0,), **config).files()
    config, weights = files.values()
    header = weights[: 8 + int.from_bytes(weights[:8], "little")]  # the rest is in the pack
    return Content(key, files, {f"sha256:{hashlib.sha256(data).hexdigest()}": len(data) for data in (config, header)})


# One pair shares its config, another its weights; all share the weights' header.
CONTENTS = (make_content("a", 0), make_content("b", 1), make_content("c", 1, lora_alpha=16))

CHANGES = ("set_alias",) * 4 + ("delete_version",) * 4 + ("undelete_version",) * 2 + ("delete_alias", "use_no_alias")
DISTURBANCES = ("roll_back",) * 2 + ("copy_index", "reindex", "reopen", "wipe", "wipe_beneath")
# Of the clock, between steps: it stands still otherwise.
JUMPS = (0, 10**9, DELETE_GRACE_NS - 1, DELETE_GRACE_NS, DELETE_GRACE_NS, 10**15, -30 * 10**9, -(10**14))

which = st.integers(0, PROCESSES - 1)


class StoreMachine(RuleBasedStateMachine):
    def __init__(self, servers: Servers) -> None:
        super().__init__()
        self.model = Model()
        self.world = servers.world(lambda: self.model.now_ns)
        self.copies: list[tuple[object, Any, int]] = []
        self.is_redis = servers.redis is not None
        self.packs: dict[str, tuple[str, int]] = {}
        self.told = 0
        self.steps = 0

    @initialize()
    def begin(self) -> None:
        self.world.open(PROCESSES)
        profile = profile_from_config(BASE_MODEL, json.dumps(MODEL_CONFIG), max_lora_rank=MAX_RANK)
        assert not self.store(0).changes.register_base_model(profile)
        self.position = self.store(1).journal.index.position()
        self.epochs = {self.position.epoch}
        self.copies.append((self.world.index.copy(), self.position, 0))
        for content in CONTENTS:
            self.upload(NAMES[0], content, False, 0)

    def teardown(self) -> None:
        self.world.close()
        self.world.index.wipe()

    # One rule for each kind of thing that happens: with a rule for each operation, most examples would have no room
    # for the few that matter together.

    @rule(data=st.data(), content=st.sampled_from(CONTENTS), promote=st.booleans(), at=which)
    def register(self, data: st.DataObject, content: Content, promote: bool, at: int) -> None:
        self.upload(data.draw(st.sampled_from(NAMES)), content, promote, at)

    @rule(data=st.data(), operation=st.sampled_from(CHANGES), at=which)
    def change(self, data: st.DataObject, operation: str, at: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.adapters) * 4 or NAMES) | st.sampled_from(NAMES))
        known = len(self.model.adapters[name].versions) if name in self.model.adapters else 0
        getattr(self, f"_{operation}")(data, name, st.integers(1, max(known, 1) + 1), at)

    def _set_alias(self, data: st.DataObject, name: str, numbers: st.SearchStrategy[int], at: int) -> None:
        alias, revision = data.draw(st.sampled_from(ALIASES)), self.revision(data, name)
        many = st.dictionaries(numbers, st.integers(1, 9), min_size=2, max_size=3).map(lambda found: [*found.items()])
        to = data.draw(numbers.map(lambda number: [(number, 1)]) | many)
        wanted = [Target(*target) for target in to]
        changes = self.store(at).changes
        self.agree(
            lambda: self.model.set_alias(name, alias, to, revision, "mover"),
            lambda: self.adapter(
                changes.set_alias(parse_name(name), alias, wanted, expected_revision=revision, actor="mover")
            ),
        )

    def _delete_alias(self, data: st.DataObject, name: str, numbers: st.SearchStrategy[int], at: int) -> None:
        alias, revision = data.draw(st.sampled_from(ALIASES)), self.revision(data, name)
        changes = self.store(at).changes
        self.agree(
            lambda: self.model.delete_alias(name, alias, revision, "mover"),
            lambda: self.adapter(
                changes.delete_alias(parse_name(name), alias, expected_revision=revision, actor="mover")
            ),
        )

    def _use_no_alias(self, data: st.DataObject, name: str, numbers: st.SearchStrategy[int], at: int) -> None:
        alias, changes = data.draw(st.sampled_from(["latest", "7"])), self.store(at).changes
        self.agree(
            lambda: self.model.set_alias(name, alias, [(1, 1)], None, ""),
            lambda: changes.set_alias(parse_name(name), alias, [Target(1)]),
        )
        self.agree(
            lambda: self.model.delete_alias(name, alias, None, ""),
            lambda: changes.delete_alias(parse_name(name), alias),
        )

    def _delete_version(self, data: st.DataObject, name: str, numbers: st.SearchStrategy[int], at: int) -> None:
        number = data.draw(numbers)
        self.agree(
            lambda: self.model.delete_version(name, number, "jane"),
            lambda: self.store(at).changes.delete_version(parse_name(name), number, actor="jane"),
        )

    def _undelete_version(self, data: st.DataObject, name: str, numbers: st.SearchStrategy[int], at: int) -> None:
        number = data.draw(numbers)
        self.agree(
            lambda: self.model.undelete_version(name, number, "jane"),
            lambda: self.store(at).changes.undelete_version(parse_name(name), number, actor="jane"),
        )

    @rule(dry_run=st.booleans(), jump=st.sampled_from(JUMPS), is_due=st.booleans(), at=which)
    def collect(self, dry_run: bool, jump: int, is_due: bool, at: int) -> None:
        due = [
            v.deleted_ns for a in self.model.adapters.values() for v in a.versions if v.deleted_ns and not v.collected
        ]
        self.model.now_ns = min(due) + DELETE_GRACE_NS if due and is_due else self.model.now_ns + jump

        def run() -> Any:
            done = self.store(at).collection.collect(dry_run=dry_run, actor="janitor")
            assert len(set(done.digests)) == done.blobs
            return sorted(done.versions), done.blobs, done.bytes

        self.agree(lambda: self.model.collect(dry_run=dry_run, actor="janitor"), run, is_ordered=False)

    @rule(jump=st.sampled_from(JUMPS))
    def the_clock_jumps(self, jump: int) -> None:
        self.model.now_ns += jump

    @rule(data=st.data(), operation=st.sampled_from(DISTURBANCES), at=which)
    def disturb(self, data: st.DataObject, operation: str, at: int) -> None:
        getattr(self, f"_{operation}")(data, at)

    def _reindex(self, data: st.DataObject, at: int) -> None:
        assert self.store(at).journal.rebuild() == len(self.model.log) + 1
        self.is_new_epoch()

    def _reopen(self, data: st.DataObject, at: int) -> None:
        self.world.close()
        self.world.open(PROCESSES)
        assert self.store(at).journal.index.position() == self.position

    def _wipe(self, data: st.DataObject, at: int) -> None:
        self.world.close()
        self.world.index.wipe()
        self.world.open(PROCESSES)
        self.is_new_epoch()

    def _wipe_beneath(self, data: st.DataObject, at: int) -> None:
        """What a Redis loses while stores use it: they say so, and neither gives an old answer."""
        if not self.is_redis:
            return
        self.world.index.wipe()
        for store in self.world.stores:
            for _ in range(2):
                with pytest.raises(Unavailable) as caught:
                    store.catalog.adapters(None, 0, "")
                assert caught.value.reason == "INDEX_HEALING"
        for store in self.world.stores:
            store.heal()
        self.is_new_epoch()

    def _copy_index(self, data: st.DataObject, at: int) -> None:
        self.copies.append((self.world.index.copy(), self.position, len(self.model.log)))

    def _roll_back(self, data: st.DataObject, at: int) -> None:
        copied, position, length = data.draw(st.sampled_from(self.copies))
        self.world.close()
        self.world.index.restore(copied)
        self.world.open(PROCESSES)
        if length < len(self.model.log):
            self.is_new_epoch()
        else:
            self.position = position
            assert self.store(at).journal.index.position() == position

    # What is read

    @invariant()
    def answers_are_the_models(self) -> None:
        if not self.world.stores:
            return
        self.steps += 1
        store = self.store(self.steps)
        model, everything = self.model, sorted(self.model.adapters)
        assert self.all_adapters(store, "", page_size=2) == [model.adapter(name) for name in everything]
        assert self.all_adapters(store, "acme", page_size=0) == [
            model.adapter(name) for name in everything if name.startswith("acme/")
        ]
        totals = store.catalog.totals()
        assert (totals.adapters, totals.versions, totals.base_models) == (*model.totals(), 1)
        for name in NAMES:
            self.compare_adapter(store, name)
        assert {blob.digest: blob.size for blob in store.blobs.list()} == model.blobs

    @invariant()
    def everything_verifies(self) -> None:
        if self.world.stores:
            found = self.store(self.steps).verify()
            assert found.problems == []
            assert found.entries == len(self.model.log) + 1

    @invariant()
    def the_feed_says_what_happened(self) -> None:
        if not self.world.stores:
            return
        index, news = self.store(self.steps + 1).journal.index, self.model.log[self.told :]
        position = index.position()
        assert (position.epoch, position.revision) == (self.position.epoch, self.position.revision + len(news))
        if news:
            changes = index.changes(self.position.revision, MANY)
            assert changes is not None
            told = [(change.revision, change.stream, json.loads(change.change)) for change in changes]
            assert told == [
                (
                    self.position.revision + count,
                    f"adapters/{name}",
                    {
                        "kind": row.kind,
                        "seq": seq,
                        "at_ns": row.at_ns,
                        "actor": row.actor,
                        "version": row.version,
                        "alias": row.alias,
                    },
                )
                for count, (name, seq, row) in enumerate(news, 1)
            ]
        self.position, self.told = position, len(self.model.log)

    def compare_adapter(self, store: AdapterStore, name: str) -> None:
        model, adapter = self.model, parse_name(name)
        self.agree(lambda: model.adapter(name), lambda: self.adapter(store.catalog.adapter(adapter)))
        for include_deleted in (True, False):
            self.agree(
                lambda include=include_deleted: model.versions(name, include_deleted=include),
                lambda include=include_deleted: self.all_versions(store, adapter, include),
            )
        self.agree(lambda: self.model_history(name), lambda: self.all_history(store, adapter))
        known = len(model.adapters[name].versions) if name in model.adapters else 0
        for text in (name, *(f"{name}:{alias}" for alias in (*ALIASES, "latest", "absent"))):
            self.resolve(store, text)
        for number in range(1, known + 2):
            self.resolve(store, f"{name}@{number}")
            self.agree(
                lambda number=number: model.version(name, number),
                lambda number=number: self.version(store.catalog.version(adapter, number)),
            )
        self.resolve(store, f"{name}@999999999999999999")
        if known:
            with pytest.raises(MultiloraError, match=r"BASE_MODEL_MISMATCH|VERSION_NOT_FOUND"):
                store.catalog.resolve(parse_reference(f"{name}:latest"), base_model="other")

    def resolve(self, store: AdapterStore, text: str) -> None:
        reference = parse_reference(text)

        def ask() -> Any:
            found = store.catalog.resolve(reference, base_model=BASE_MODEL)
            return [((target.version, target.weight), self.version(version)) for target, version in found.items()]

        self.agree(lambda: self.model.resolve(str(reference.adapter), reference.version, reference.alias), ask)

    # How the two are compared

    def store(self, at: int) -> AdapterStore:
        return self.world.stores[at % PROCESSES]

    def revision(self, data: st.DataObject, name: str) -> int | None:
        expected = data.draw(st.sampled_from(["none", "none", "right", "wrong"]))
        known = len(self.model.adapters[name].history) if name in self.model.adapters else 0
        return {"none": None, "right": known, "wrong": known - 1}[expected]

    def is_new_epoch(self) -> None:
        """An epoch that nobody was told of before."""
        self.position = self.store(0).journal.index.position()
        assert self.position.epoch not in self.epochs
        assert self.position.revision >= 1
        assert self.store(1).journal.index.position() == self.position
        self.epochs.add(self.position.epoch)
        self.told = len(self.model.log)

    def upload(self, name: str, content: Content, promote: bool, at: int) -> None:
        header = records.UploadHeader(parse_name(name), BASE_MODEL, promote=promote)
        registration = self.store(at).registration
        with registration.begin_upload(header) as upload:
            for file, data in content.files.items():
                upload.write(file, data)
            registered = registration.register(header, upload, actor="uploader")
        made = registered.version.content
        pack = self.packs.setdefault(content.key, (made.pack_digest, made.pack_size))
        assert pack == (made.pack_digest, made.pack_size), "one content, two packs"
        content.blobs[made.pack_digest] = made.pack_size
        assert (self.version(registered.version), registered.existed) == self.model.register(
            name, content, promote=promote, actor="uploader"
        )

    def agree(self, of_model: Callable[[], Any], of_store: Callable[[], Any], *, is_ordered: bool = True) -> None:
        try:
            answer: Any = of_store()
        except MultiloraError as error:
            answer = error.reason
        before = len(self.model.log)
        try:
            expected: Any = of_model()
        except Refused as refused:
            expected = str(refused)
        note(f"-> {expected if len(str(expected)) < 80 else '…'}")
        assert answer == expected
        if not is_ordered:
            self.take_order(before)

    def take_order(self, before: int) -> None:
        """A log lists its streams in no order, so neither does what a collection adds to several."""
        changes = self.store(0).journal.index.changes(self.position.revision, MANY) or []
        order = [(change.stream.removeprefix("adapters/"), json.loads(change.change)["seq"]) for change in changes]
        self.model.log[before:] = sorted(self.model.log[before:], key=lambda found: order.index(found[:2]))

    @staticmethod
    def adapter(found: records.Adapter) -> Any:
        assert found.base_model == BASE_MODEL
        to = {alias: tuple((t.version, t.weight) for t in targets) for alias, targets in found.aliases.items()}
        return str(found.name), to, found.latest_version, found.num_versions, found.revision

    def version(self, found: records.Version) -> Any:
        pack = found.content.pack_digest
        key = next(key for key, (digest, _) in self.packs.items() if digest == pack)
        return found.number, key, found.created_ns, found.deleted, tuple(found.aliases), found.collected

    def all_adapters(self, store: AdapterStore, tenant: str, page_size: int) -> list[Any]:
        return [
            self.adapter(one)
            for one in pages(lambda token: store.catalog.adapters([tenant] if tenant else None, page_size, token))
        ]

    def all_versions(self, store: AdapterStore, adapter: AdapterName, include_deleted: bool) -> list[Any]:
        def page(token: str) -> tuple[list[records.Version], str]:
            return store.catalog.versions(adapter, include_deleted=include_deleted, page_size=2, page_token=token)

        return [self.version(one) for one in pages(page)]

    def all_history(self, store: AdapterStore, adapter: AdapterName) -> list[Any]:
        rows = []
        for seq, entry in pages(lambda token: store.history(adapter, 3, token)):
            version, alias, to = subject(entry.body)
            found = tuple((target.version, target.weight) for target in to)
            rows.append((seq, entry.body.kind, version, alias, entry.at_ns, entry.actor, found))
        return rows

    def model_history(self, name: str) -> list[Any]:
        if name not in self.model.adapters:
            raise Refused("ADAPTER_NOT_FOUND")
        rows = enumerate(self.model.adapters[name].history, 1)
        return [(n, r.kind, r.version, r.alias, r.at_ns, r.actor, r.targets) for n, r in rows][::-1]


def pages(read: Callable[[str], tuple[list[Any], str]]) -> list[Any]:
    found, token = [], ""
    while True:
        page, token = read(token)
        found += page
        if not token:
            return found


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_the_store_is_its_model(
    combination: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3 = request.getfixturevalue("s3_server") if combination.startswith("s3") else None
    redis = request.getfixturevalue("redis_server") if combination.endswith("redis") else None
    for name, value in (s3.environment if s3 else {}).items():
        monkeypatch.setenv(name, value)
    servers = Servers(combination, tmp_path, s3, redis)
    examples, steps = SIZES[combination]
    run_state_machine_as_test(
        lambda: StoreMachine(servers),
        settings=settings(
            max_examples=EXAMPLES or examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=not EXAMPLES,
            database=None,
            phases=[Phase.generate, *([Phase.shrink] if EXAMPLES else [])],  # shrinking takes minutes
            suppress_health_check=list(HealthCheck),
        ),
    )
