"""The log in a bucket, one object an entry: see interface.py for the layout.

An entry is created with `If-None-Match: *`, which one of several writers wins. `S3Bucket.create` tells a writer whose
answer was lost whether it was the one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby

from services.adapter_store.log.interface import StreamInfo
from services.adapter_store.s3 import S3Bucket
from services.adapter_store.steps import commit_step

_ENTRY = re.compile(r"log/(.+)/([0-9]{12})\.json")
_PAGE = 1000


class S3Log:
    def __init__(self, bucket: S3Bucket, *, page_size: int = _PAGE) -> None:
        """page_size: keys per listing; the default is the most that S3 gives."""
        self._bucket = bucket
        self._page_size = page_size

    def close(self) -> None:
        """The bucket is closed by who opened it."""

    def append(self, stream: str, seq: int, data: bytes) -> bool:
        is_new = self._bucket.create(_name(stream, seq), data)
        commit_step("log.s3.created")
        return is_new

    def read(self, stream: str, seq: int) -> bytes | None:
        return self._bucket.get(_name(stream, seq))

    def streams(self) -> Iterator[StreamInfo]:
        # keys come sorted, so those of one stream come together
        for stream, seqs in groupby(self._entries(), key=lambda entry: entry[0]):
            last = count = 0
            for _, seq in seqs:
                last, count = max(last, seq), count + 1
            yield StreamInfo(stream, last, count)

    def _entries(self) -> Iterator[tuple[str, int]]:
        for listed in self._bucket.list("log/", page_size=self._page_size):
            if found := _ENTRY.fullmatch(listed.name):
                yield found[1], int(found[2])


def _name(stream: str, seq: int) -> str:
    return f"log/{stream}/{seq:012d}.json"
