"""What it costs to ask who calls: `python -m services.bench.guard [--out FILE]`, or `make bench-guard`.

The same resolves are sent to stores over one directory, in turns: one is open, one asks for a token, one for a token
over TLS. What counts is the processor's time that each store takes, which the machine's other work leaves alone. Then
the look-up of a token by itself, of one that is known and of one that is not: they should take as long.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from multilora.adapter_store.v1 import store_pb2, store_pb2_grpc
from services.bench import clients, servers
from services.bench.certificates import Authority
from services.bench.progress import console, says
from services.bench.results import Figure, Result, print_table, spread, write_lines
from services.bench.seeding import TENANT, adapter_name, seed
from services.common.auth.credentials import NONE_SHOWN, Credentials
from services.common.auth.permissions import Role
from services.common.auth.tokens import TOKEN_PREFIX, Tokens, add_token

CALLS, AT_ONCE, ROUNDS = 1600, 16, 9
LOOK_UPS = 20_000
ADAPTERS = 10
# Of a call that the store answers from its index; a replica asks once for each request of many tokens.
MOST_WITH_TOKEN = 1.15
MOST_APART = 1.1


Shown = tuple[servers.Service, Credentials]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=CALLS, help="of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="after one that warms up (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this; default: standard output")
    options = parser.parse_args()
    servers.end_with_sigterm()
    with tempfile.TemporaryDirectory(prefix="bench-guard-") as directory:
        results = write_lines(run(Path(directory), options.calls, options.rounds), options.out)
    print_table(results, console, "Asking who calls")
    return int(any(figure.passed is False for result in results for figure in result.figures))


def run(work: Path, calls: int, rounds: int) -> Iterator[Result]:
    """Both measurements, on stores of their own beneath `work`."""
    authority, tokens_file = Authority(work / "certificates"), work / "tokens.toml"
    shown = authority.issue("localhost")
    token = add_token(tokens_file, name="bench", role=Role.READER, tenant=TENANT)
    asking = ["--tokens", str(tokens_file)]
    encrypted = ["--tls-cert", str(shown.cert), "--tls-key", str(shown.key)]
    seed(work / "store", ADAPTERS)
    stores = {
        "open": ([], NONE_SHOWN),
        "token": (asking, Credentials(token=token)),
        "token_tls": ([*asking, *encrypted], Credentials(ca=authority.ca, token=token)),
    }
    with contextlib.ExitStack() as running:
        where = {
            name: (running.enter_context(servers.store(work / "store", *flags)), credentials)
            for name, (flags, credentials) in stores.items()
        }
        with says(f"{calls} resolves, {AT_ONCE} at once"):
            yield asyncio.run(resolving(where, calls, rounds))
    yield looking_up(Tokens(tokens_file), token, rounds)


async def resolving(where: dict[str, Shown], calls: int, rounds: int) -> Result:
    """Microseconds of each store's processes a call, round by round."""
    took: dict[str, list[float]] = {name: [] for name in where}
    for number in range(rounds + 1):
        for name, (store, credentials) in where.items():
            before = cpu_seconds(store.pid)
            await resolve(store.address, credentials, calls)
            if number:
                took[name].append((cpu_seconds(store.pid) - before) / calls * 1e6)
    ratios = {
        name: spread([mine / free for mine, free in zip(took[name], took["open"], strict=True)])
        for name in ("token", "token_tls")
    }
    each = spread(took["open"])["median"]
    figures = [
        Figure(
            f"a resolve {what} ÷ an open one, in the store",
            ratios[name]["median"],
            target=target,
            at_most=True,
            note=f"{ratios[name]['low']:g} to {ratios[name]['high']:g}; open: {each:.0f} µs",
        )
        for name, what, target in (
            ("token", "with a token", MOST_WITH_TOKEN),
            ("token_tls", "with a token over TLS", None),
        )
    ]
    setup = {"calls": calls, "at_once": AT_ONCE, "rounds": rounds}
    return Result("guard", setup, {"ratios": ratios, "open_us": each}, figures)


async def resolve(address: str, credentials: Credentials, calls: int) -> None:
    metadata = credentials.metadata()

    async def one_after_the_other(stub: store_pb2_grpc.AdapterStoreServiceAsyncStub, count: int) -> None:
        for number in range(count):
            reference = f"{TENANT}/{adapter_name(number % ADAPTERS)}"
            await stub.ResolveAdapter(store_pb2.ResolveAdapterRequest(reference=reference), metadata=metadata)

    async with clients.connect(address, credentials) as channel:
        stub = store_pb2_grpc.AdapterStoreServiceStub(channel)
        await asyncio.gather(*(one_after_the_other(stub, calls // AT_ONCE) for _ in range(AT_ONCE)))


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process, by the scheduler's own count."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def looking_up(tokens: Tokens, known: str, rounds: int) -> Result:
    """Tokens as long as each other, in turns: would the time tell one that is known?"""
    asked = {"known": known, "unknown": TOKEN_PREFIX + "x" * (len(known) - len(TOKEN_PREFIX))}
    took: dict[str, list[float]] = {name: [] for name in asked}
    for _ in range(rounds):
        for name, token in asked.items():
            began = time.perf_counter()
            for _ in range(LOOK_UPS):
                tokens.by_token(token)
            took[name].append((time.perf_counter() - began) / LOOK_UPS * 1e6)
    apart = spread([bad / good for bad, good in zip(took["unknown"], took["known"], strict=True)])
    each = spread(took["known"])["median"]
    figure = Figure(
        "looking up an unknown token ÷ a known one",
        apart["median"],
        target=MOST_APART,
        at_most=True,
        note=f"{each:g} µs",
    )
    return Result("token-look-up", {"look_ups": LOOK_UPS, "rounds": rounds}, {"ratio": apart, "us": each}, [figure])


if __name__ == "__main__":
    sys.exit(main())
