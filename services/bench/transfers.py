"""Bytes in and out: registering and pulling beside bare programs that move the same bytes, and memory under pulls."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from services.bench import clients
from services.bench.adapters import Files
from services.bench.results import Figure, Result, alternate, spread
from services.bench.servers import S3Server, Service

REGISTER_SHARE, PULL_SHARE, S3_PULL_SHARE = 0.70, 0.70, 0.40
MAX_RESIDENT_MB = 300.0


async def registering(store: Service, bare: Service, files: Files, *, rounds: int, where: str) -> tuple[Result, str]:
    """Each round a new version; also the pack digest of the last."""
    digest = ""
    async with clients.connect(store.address) as ours, clients.connect(bare.address) as theirs:
        await clients.register_base(ours)

        async def to_store(number: int) -> None:
            nonlocal digest
            files.variant(number)
            digest = await clients.register(ours, "big", files)

        seconds = await alternate(rounds, store=to_store, bare=lambda _: clients.bare_upload(theirs, files))
    name = f"register {files.size / 1e6:.0f} MB, {where}"
    target = REGISTER_SHARE if where == "disk" else None
    return _ratio("register", name, files.size, where, seconds, target, "bare receive + sha256 + write + fsync"), digest


async def register_one(store: Service, files: Files) -> str:
    """Its pack digest."""
    async with clients.connect(store.address) as channel:
        return await clients.register(channel, "pulled", files)


async def pulling(store: Service, bare: Service, digest: str, blob: Path, *, rounds: int) -> Result:
    """From disk, beside a bare download of the very same file; both clients only count the bytes."""
    size = await asyncio.to_thread(os.path.getsize, blob)
    async with clients.connect(store.address) as ours, clients.connect(bare.address) as theirs:

        async def from_store(_: int) -> None:
            assert await clients.pull(ours, digest) == size

        async def from_bare(_: int) -> None:
            assert await clients.bare_download(theirs, str(blob)) == size

        seconds = await alternate(rounds, store=from_store, bare=from_bare)
    name = f"pull {size / 1e6:.0f} MB, disk"
    return _ratio("pull", name, size, "disk", seconds, PULL_SHARE, "bare grpc.aio download")


async def pulling_s3(store: Service, s3: S3Server, prefix: str, digest: str, directory: Path, *, rounds: int) -> Result:
    """Through a store on S3, beside boto3's download_file straight from S3; both end in a file."""
    client = await asyncio.to_thread(s3.client)
    hexadecimal = digest.removeprefix("sha256:")
    key = f"{prefix}/blobs/sha256/{hexadecimal[:2]}/{hexadecimal}"
    size: int = client.head_object(Bucket=s3.bucket, Key=key)["ContentLength"]
    async with clients.connect(store.address) as ours:

        async def from_store(_: int) -> None:
            with (directory / "pulled").open("wb", buffering=0) as file:
                assert await clients.pull(ours, digest, file.write) == size

        async def from_boto3(_: int) -> None:
            target = directory / "downloaded"
            await asyncio.to_thread(client.download_file, s3.bucket, key, str(target))
            assert target.stat().st_size == size

        seconds = await alternate(rounds, store=from_store, bare=from_boto3)
    name = f"pull {size / 1e6:.0f} MB, S3"
    return _ratio("pull", name, size, "S3", seconds, S3_PULL_SHARE, "boto3 download_file")


async def memory(store: Service, digest: str, *, pulls: int, where: str) -> Result:
    """The most that a store's process held while `pulls` clients pulled one digest at once."""
    reset_peak(store.pid)
    before = peak_mb(store.pid)
    async with AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(clients.connect(store.address)) for _ in range(pulls)]
        sizes = await asyncio.gather(*(clients.pull(channel, digest) for channel in channels))
    assert len(set(sizes)) == 1
    peak = peak_mb(store.pid)
    setup = {"backend": where, "pulls": pulls, "bytes_each": sizes[0]}
    figure = Figure(
        f"{pulls} pulls of one {sizes[0] / 1e6:.0f} MB digest, {where}: peak resident",
        peak,
        " MB",
        MAX_RESIDENT_MB,
        at_most=True,
        note=f"{before:.0f} MB before",
    )
    return Result("pull_memory", setup, {"peak_mb": peak, "before_mb": before}, [figure])


def reset_peak(pid: int) -> None:
    """Let the kernel count the peak of resident memory anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return round(int(kilobytes) * 1024 / 1e6, 1)


def _ratio(
    benchmark: str,
    name: str,
    size: int,
    where: str,
    seconds: dict[str, list[float]],
    target: float | None,
    beside: str,
) -> Result:
    """How fast the store is as a share of the bare program, round by round."""
    ratios = [bare / store for store, bare in zip(seconds["store"], seconds["bare"], strict=True)]
    found = spread(ratios)
    rates = {who: size / 1e6 / spread(took)["median"] for who, took in seconds.items()}
    setup: dict[str, Any] = {"backend": where, "bytes": size, "rounds": len(ratios), "beside": beside}
    metrics = {f"{who}_seconds": spread(took) for who, took in seconds.items()} | {"ratio": found}
    note = f"{found['low']:g} to {found['high']:g}; {rates['store']:.0f} MB/s, {beside} {rates['bare']:.0f} MB/s"
    return Result(benchmark, setup, metrics, [Figure(name, found["median"], "", target, note=note)])
