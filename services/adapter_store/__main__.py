"""Starts the adapter store: `python -m services.adapter_store`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from services.adapter_store.backends import open_index, open_place, open_root
from services.adapter_store.collection import DELETE_GRACE_SECONDS
from services.adapter_store.config import DEFAULT_MAX_UPLOAD_BYTES, DEFAULT_PORT, S3_ADDRESSING, StoreConfig
from services.adapter_store.server import make_server, make_servers, serving
from services.adapter_store.store import AdapterStore
from services.common.auth.settings import ADMIN_PORT_OFFSET, SAME_PORT, Security, admin_port
from services.common.errors import InvalidArgument, MultiloraError
from services.common.process import keep_freed_memory, settle
from services.common.rpc import wait_for_signal

PROGRAM = "multilora-adapter-store"
STOP_GRACE_SECONDS = 10.0

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT. 2: a flag is invalid; 1: the store cannot start."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        config = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        asyncio.run(serve(config))
    except InvalidArgument as error:
        print(f"{PROGRAM}: {error.message}", file=sys.stderr)
        return 2
    except (MultiloraError, OSError) as error:
        print(f"{PROGRAM}: cannot start: {error}", file=sys.stderr)
        return 1
    return 0


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidArgument("INVALID_FLAG", f"{message}; --help lists the flags")


def parse_arguments(arguments: Sequence[str]) -> StoreConfig:
    """Raises InvalidArgument naming the flag."""
    parser = _OneLineParser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="0: any free one (default: %(default)s)")
    parser.add_argument("--metrics-port", type=int, default=-1, help="of /metrics over HTTP; -1: none (the default)")
    parser.add_argument(
        "--admin-port",
        type=int,
        help=f"of administration; 0: any free one, {SAME_PORT}: --port itself (default: --port + {ADMIN_PORT_OFFSET})",
    )
    Security.add_flags(parser)
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(".data/store"),
        help="where everything without a flag of its own is (default: %(default)s)",
    )
    parser.add_argument(
        "--uri-root",
        action="append",
        default=[],
        help="directory or s3://bucket/prefix that RegisterFromUri may read beneath; may be given more than once "
        "(default: none)",
    )
    parser.add_argument(
        "--max-upload-bytes",
        type=int,
        default=DEFAULT_MAX_UPLOAD_BYTES,
        help="largest upload, both files together (default: %(default)s)",
    )
    parser.add_argument(
        "--blobs",
        default="",
        help="where blobs and log are: a path or s3://bucket/prefix (default: the data directory)",
    )
    parser.add_argument("--s3-endpoint-url", default="", help="of an S3 server (default: $AWS_ENDPOINT_URL_S3, or AWS)")
    parser.add_argument("--s3-region", default="", help="(default: $AWS_REGION); credentials come as for any AWS tool")
    parser.add_argument(
        "--s3-addressing",
        default="auto",
        choices=sorted(S3_ADDRESSING),
        help="where the bucket is named: path or host name (default: the host name on AWS, the path elsewhere)",
    )
    parser.add_argument(
        "--index",
        default=os.environ.get("MULTILORA_INDEX", ""),
        help="where the index is: a path, redis://host:port/db or rediss://…; user and password for it come from "
        "$REDIS_USERNAME and $REDIS_PASSWORD (default: $MULTILORA_INDEX, or index.sqlite3 in the data directory)",
    )
    parser.add_argument(
        "--redis-prefix",
        default=os.environ.get("MULTILORA_REDIS_PREFIX", ""),
        help="of every key of the index in Redis (default: $MULTILORA_REDIS_PREFIX, or multilora)",
    )
    parser.add_argument(
        "--delete-grace",
        type=float,
        default=DELETE_GRACE_SECONDS,
        metavar="SECONDS",
        help="how long a deleted version can be brought back before a collection takes it (default: %(default)g)",
    )
    flags = parser.parse_args(arguments)
    return StoreConfig(
        host=flags.host,
        port=flags.port,
        admin_port=flags.admin_port,
        security=Security.of_flags(flags),
        metrics_port=None if flags.metrics_port == -1 else flags.metrics_port,
        data_dir=flags.data_dir,
        uri_roots=tuple(flags.uri_root),
        max_upload_bytes=flags.max_upload_bytes,
        blobs=flags.blobs,
        index=flags.index,
        redis_prefix=flags.redis_prefix,
        s3_endpoint_url=flags.s3_endpoint_url,
        s3_region=flags.s3_region,
        s3_addressing=flags.s3_addressing,
        delete_grace=flags.delete_grace,
    )


async def serve(config: StoreConfig) -> None:
    """Serve until a signal, then let calls in flight end. Raises MultiloraError when it cannot start."""
    guard, tls = config.security.guard("adapter-store"), config.security.tls()
    asked, admin = admin_port(config.admin_port, config.port), None
    if asked == SAME_PORT:
        server = make_server(guard, tls)
    else:
        server, admin = make_servers(guard, tls)
    where = config.address(server.bind(config.address(config.port)))
    if admin is not None:
        where += f" admin={config.address(admin.bind(config.address(asked)))}"
    blobs, entries = open_place(
        config.blobs_place,
        staging=config.data_dir,
        endpoint_url=config.s3_endpoint_url or None,
        region=config.s3_region or None,
        path_style=S3_ADDRESSING[config.s3_addressing],
    )
    store = AdapterStore(
        blobs,
        entries,
        open_index(config.index_place, prefix=config.redis_prefix),
        max_upload_bytes=config.max_upload_bytes,
        uri_roots=list(map(open_root, config.uri_root_places)),
        delete_grace=config.delete_grace,
    )
    store.heal()
    settle()
    keep_freed_memory()
    with contextlib.ExitStack() as opened:
        if config.metrics_port is not None:
            from services.adapter_store.metrics import metrics_served  # a tenth of the start, for those who ask

            port = opened.enter_context(metrics_served(config.host, config.metrics_port, store.catalog, server.calls))
            log.info("metrics on %s:%d", config.host, port)
        async with (
            serving(server, store, admin=admin, stop_grace=STOP_GRACE_SECONDS),
            server.health_at(config.security.health_address(config.host)),
        ):
            print(f"listening on {where}", flush=True)
            log.info("blobs and log in %s, index in %s", config.blobs_place, config.index_shown)
            await wait_for_signal()
            log.info("stopping")
    store.close()
    log.info("stopped")


if __name__ == "__main__":
    sys.exit(main())
