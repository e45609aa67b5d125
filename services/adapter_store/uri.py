"""What RegisterFromUri reads: a PEFT directory beneath the store's configured roots, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from services.adapter_store.s3 import S3Bucket
from services.adapter_store.upload import Upload
from services.adapter_store.uri_file import copy_from_directory
from services.adapter_store.uri_refusals import no_roots
from services.adapter_store.uri_s3 import copy_from_bucket

Root = Path | S3Bucket


class UriRoots:
    """Directories, and prefixes of buckets. A URI chooses among what lies beneath them, and never a server."""

    def __init__(self, roots: Sequence[Root] = ()) -> None:
        self._directories = tuple(root.resolve() for root in roots if isinstance(root, Path))
        self._buckets = tuple(root for root in roots if isinstance(root, S3Bucket))

    def close(self) -> None:
        for bucket in self._buckets:
            bucket.close()

    def copy(self, uri: str, upload: Upload) -> None:
        """Copy both files of a PEFT directory into `upload`.

        Raises InvalidArgument, NotFound, PermissionDenied, FailedPrecondition, and Unavailable when S3 is away.
        """
        if not self._directories and not self._buckets:
            raise no_roots()
        if uri.startswith("s3://"):
            copy_from_bucket(uri, self._buckets, upload)
        else:
            copy_from_directory(uri, self._directories, upload)
