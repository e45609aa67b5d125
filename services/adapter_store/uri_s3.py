"""A PEFT directory behind an `s3://bucket/key` URI.

    s3://bucket/some%20prefix/x     read as the objects   some prefix/x/adapter_config.json
                                                          some prefix/x/adapter_model.safetensors

The URI names a bucket and a key, and never a server: endpoint, region and credentials are the root's. The key is
percent-decoded once, as UTF-8, and compared after that; one slash may end it. To S3 a key is no path, but a client, a
proxy or a server may take it for one: so a key with an empty segment, `.` or `..` is beneath no root.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import unquote

from services.adapter_store.blobs.s3_ranges import RANGE_BYTES, fetch_range
from services.adapter_store.s3 import Head, S3Bucket
from services.adapter_store.s3_errors import Taken
from services.adapter_store.upload import CONFIG_FILE, WEIGHTS_FILE, Upload, check_no_pickle
from services.adapter_store.uri_refusals import invalid_uri, nothing_there, outside_roots
from services.common.errors import DataLoss, FailedPrecondition, NotFound

MAX_KEY_BYTES = 1024 - len(f"/{WEIGHTS_FILE}")  # S3's own limit is 1024
_MOST_LISTED = 1000


def copy_from_bucket(uri: str, roots: Sequence[S3Bucket], upload: Upload) -> None:
    """Copy both files beneath a key into `upload`, a bounded range at a time; too large a file is not begun.

    Raises InvalidArgument, NotFound, PermissionDenied, FailedPrecondition, Unavailable.
    """
    bucket, directory = _resolve(uri, roots)
    heads = {file: head for file in (CONFIG_FILE, WEIGHTS_FILE) if (head := bucket.head(directory + file))}
    if WEIGHTS_FILE not in heads:
        _refuse_pickles(bucket, directory)
    if not heads:
        raise nothing_there(uri)
    upload.check_sizes({file: head.size for file, head in heads.items()})
    for file, head in heads.items():
        _copy(bucket, directory + file, head, file, upload)


def _resolve(uri: str, roots: Sequence[S3Bucket]) -> tuple[S3Bucket, str]:
    """The root that the URI lies beneath, and what names beneath that root start with."""
    name, key = _parse(uri)
    if not key or not {"", ".", ".."}.intersection(key.split("/")):
        for root in roots:
            if name == root.config.bucket and root.config.holds(key):
                return root, root.name(f"{key}/" if key else "")
    raise outside_roots(uri)


def _parse(uri: str) -> tuple[str, str]:
    """Bucket and key, decoded. Of several ways to write a URI only this one is taken: no query, no fragment."""
    found = re.fullmatch(r"s3://([^/?#]*)(?:/([^?#]*))?", uri)
    if found is None:
        raise invalid_uri(uri)
    try:
        key = unquote(found[2] or "", errors="strict").removesuffix("/")
    except UnicodeDecodeError as error:
        raise invalid_uri(uri) from error
    if len(key.encode()) > MAX_KEY_BYTES or re.search(r"[\x00-\x1f\x7f]", key):
        raise invalid_uri(uri)
    return found[1], key


def _refuse_pickles(bucket: S3Bucket, directory: str) -> None:
    listed = zip(range(_MOST_LISTED), bucket.list(f"{directory}adapter_model."), strict=False)
    check_no_pickle(entry.name.removeprefix(directory) for _, entry in listed)


def _copy(bucket: S3Bucket, name: str, head: Head, file: str, upload: Upload) -> None:
    for start in range(0, head.size, RANGE_BYTES):
        try:
            data = fetch_range(bucket, name, start, min(start + RANGE_BYTES, head.size), etag=head.etag)
        except (DataLoss, NotFound, Taken) as error:
            raise FailedPrecondition(
                "SOURCE_CHANGED", f"{bucket.config.uri}/{name} changed while it was read; try again", field="uri"
            ) from error
        upload.write(file, memoryview(data))
    if head.size == 0:
        upload.write(file, b"")  # an empty file has come, too
