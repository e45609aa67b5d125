"""Removing a blob from S3 while others may commit it: a commit always wins.

S3 has no lock, and no request that removes an object only if it is old. So a removal announces itself first:

    removal                                        commit
    1. create removing/<hex>, exclusively          1. write the blob, or renew it: now it is young
    2. look at the blob: young or gone → 5         2. wait while removing/<hex> is there
    3. remove the blob                             3. look at the blob: gone → 1
    5. remove removing/<hex>

A removal whose step 2 came before the commit's step 1 is announced throughout, so the commit waits for it and then
sees what it did; one whose step 2 comes after finds a young blob. A removal that died, or does not know whether step 3
happened, leaves its announcement. That is taken over once step 3 can no longer happen, by a compare-and-set that one
process wins: a removal begins step 3 soon after step 1 or not at all, and sends it once, with short timeouts.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

from services.adapter_store.s3 import Head, S3Bucket
from services.adapter_store.steps import commit_step
from services.common.errors import Unavailable

BEGIN_WITHIN_SECONDS = 10.0
CONNECT_SECONDS, READ_SECONDS = 3.0, 10.0
# and as much again for a request that the server works on when its client has given up
STALE_SECONDS = 2 * (BEGIN_WITHIN_SECONDS + CONNECT_SECONDS + READ_SECONDS)
WAIT_SECONDS = STALE_SECONDS + 15.0
_POLL_SECONDS = 0.2


class S3Removals:
    def __init__(self, bucket: S3Bucket) -> None:
        self._bucket = bucket
        self.stale_seconds = STALE_SECONDS

    @cached_property
    def _once(self) -> S3Bucket:
        """For the request that must not come late."""
        return S3Bucket(
            replace(self._bucket.config, attempts=1, connect_timeout=CONNECT_SECONDS, read_timeout=READ_SECONDS)
        )

    def remove(self, name: str, is_old: Callable[[Head], bool]) -> bool:
        """Remove a blob if it is old; False when it is not, is not there, or somebody else is removing it."""
        head = self._bucket.head(name)
        if head is None or not is_old(head):
            return False
        marker, began = _marker(name), time.monotonic()
        if not self._announce(marker):
            return False
        commit_step("blobs.s3.announced")
        head = self._bucket.head(name)
        is_wanted = head is not None and is_old(head) and time.monotonic() - began < BEGIN_WITHIN_SECONDS
        if is_wanted:
            self._once.delete(name)  # when this fails, it may still happen: the announcement stays
            commit_step("blobs.s3.removed")
        self._bucket.delete(marker)
        return is_wanted

    def close(self) -> None:
        if "_once" in self.__dict__:
            self._once.close()

    def wait(self, name: str) -> None:
        """Return once no removal is announced. Raises Unavailable when one takes long."""
        marker = _marker(name)
        until = time.monotonic() + WAIT_SECONDS
        while (head := self._bucket.head(marker)) is not None:
            if self._take_over(marker, head):
                self._bucket.delete(marker)
            elif time.monotonic() >= until:
                raise Unavailable(
                    "BLOB_BEING_REMOVED",
                    f"others remove {name} again and again; upload it again later",
                    retry_after=self.stale_seconds,
                )
            else:
                time.sleep(_POLL_SECONDS)

    def _announce(self, marker: str) -> bool:
        if self._bucket.create(marker, secrets.token_bytes(16)):
            return True
        head = self._bucket.head(marker)
        return head is not None and self._take_over(marker, head)

    def _take_over(self, marker: str, head: Head) -> bool:
        """Make a dead removal's announcement one's own. The bytes are random, so its ETag names one announcement."""
        return head.now - head.modified > self.stale_seconds and self._bucket.replace(
            marker, secrets.token_bytes(16), etag=head.etag
        )


def _marker(name: str) -> str:
    return f"removing/{name.rpartition('/')[2]}"
