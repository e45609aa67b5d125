"""Removing a blob from S3 while others may commit it: a commit always wins.

S3 has no lock, and no request that removes an object only if it is old. So a removal announces itself first:

    removal                                        commit
    1. create removing/<hex>, exclusively          1. write the blob, or renew it: now it is young
    2. look at the blob: young or gone → 5         2. wait while removing/<hex> is there
    3. remove the blob                             3. look at the blob: gone → 1
    5. remove removing/<hex>

A removal whose step 2 came before the commit's step 1 is announced throughout, so the commit waits for it and then
sees what it did; one whose step 2 comes after finds a young blob. A removal that died leaves its announcement; that is
taken over once it is older than its requests may live, by a compare-and-set that one process wins.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from services.adapter_store.s3 import Head, S3Bucket
from services.adapter_store.steps import commit_step
from services.common.errors import Unavailable

WAIT_SECONDS = 10.0
_POLL_SECONDS = 0.2


class S3Removals:
    def __init__(self, bucket: S3Bucket) -> None:
        self._bucket = bucket
        # Of the three requests that follow an announcement, none can take longer than all of its attempts.
        each = bucket.config.attempts * (bucket.config.connect_timeout + bucket.config.read_timeout)
        self.stale_seconds = 4 * each + 60

    def remove(self, name: str, is_old: Callable[[Head], bool]) -> bool:
        """Remove a blob if it is old; False when it is not, is not there, or somebody else is removing it."""
        head = self._bucket.head(name)
        if head is None or not is_old(head):
            return False
        marker = _marker(name)
        if not self._announce(marker):
            return False
        commit_step("blobs.s3.announced")
        head = self._bucket.head(name)
        is_wanted = head is not None and is_old(head)
        if is_wanted:
            # When this fails, the request may still be under way, so the announcement stays until it is stale.
            self._bucket.delete(name)
            commit_step("blobs.s3.removed")
        self._bucket.delete(marker)
        return is_wanted

    def wait(self, name: str) -> None:
        """Return once no removal is announced. Raises Unavailable when one takes long."""
        marker = _marker(name)
        until = time.monotonic() + WAIT_SECONDS
        while (head := self._bucket.head(marker)) is not None:
            if self._take_over(marker, head):
                self._bucket.delete(marker)
            elif time.monotonic() >= until:
                left = max(1.0, self.stale_seconds - (head.now - head.modified))
                raise Unavailable(
                    "BLOB_BEING_REMOVED",
                    f"another store process is removing {name} and does not end; it is given up in {left:.0f} s, "
                    "upload again then",
                    retry_after=left,
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
