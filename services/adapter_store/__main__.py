"""Starts the adapter store: `python -m services.adapter_store`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from multilora.adapter_store.v1 import admin_pb2, admin_pb2_grpc, store_pb2, store_pb2_grpc
from services.adapter_store.admin_servicer import AdapterAdminServicer
from services.adapter_store.blobs.disk import DiskBlobs
from services.adapter_store.config import DEFAULT_MAX_UPLOAD_BYTES, DEFAULT_PORT, StoreConfig
from services.adapter_store.index.sqlite import SqliteIndex
from services.adapter_store.servicer import AdapterStoreServicer
from services.adapter_store.store import AdapterStore
from services.common.errors import InvalidArgument, MultiloraError
from services.common.rpc import GrpcServer, wait_for_signal

PROGRAM = "multilora-adapter-store"
# Validation and packing keep a core busy each; more at once would only take cores from resolves and pulls.
REGISTRATION_THREADS = 2
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
    parser.add_argument(
        "--data-dir", type=Path, default=Path(".data/store"), help="where everything is kept (default: %(default)s)"
    )
    parser.add_argument(
        "--uri-root",
        type=Path,
        action="append",
        default=[],
        help="directory that RegisterFromUri may read; may be given more than once (default: none)",
    )
    parser.add_argument(
        "--max-upload-bytes",
        type=int,
        default=DEFAULT_MAX_UPLOAD_BYTES,
        help="largest upload, both files together (default: %(default)s)",
    )
    flags = parser.parse_args(arguments)
    return StoreConfig(
        host=flags.host,
        port=flags.port,
        data_dir=flags.data_dir,
        uri_roots=tuple(flags.uri_root),
        max_upload_bytes=flags.max_upload_bytes,
    )


async def serve(config: StoreConfig) -> None:
    """Serve until a signal, then let calls in flight end. Raises MultiloraError when it cannot start."""
    server = GrpcServer(
        [
            store_pb2.DESCRIPTOR.services_by_name["AdapterStoreService"].full_name,
            admin_pb2.DESCRIPTOR.services_by_name["AdapterAdminService"].full_name,
        ]
    )
    port = server.bind(config.address)
    blobs = DiskBlobs(config.data_dir)
    store = AdapterStore(
        blobs,
        SqliteIndex(config.data_dir / "index.sqlite3"),
        max_upload_bytes=config.max_upload_bytes,
        uri_roots=config.uri_roots,
    )
    with ThreadPoolExecutor(REGISTRATION_THREADS, "registration") as registrations:
        store_pb2_grpc.add_AdapterStoreServiceServicer_to_server(AdapterStoreServicer(store), server.server)
        admin_pb2_grpc.add_AdapterAdminServiceServicer_to_server(
            AdapterAdminServicer(store, registrations), server.server
        )
        await server.start()
        await server.set_serving(True)
        print(f"listening on {config.host}:{port}", flush=True)
        log.info("data in %s", config.data_dir)
        await wait_for_signal()
        log.info("stopping")
        await server.stop(STOP_GRACE_SECONDS)
    store.close()
    log.info("stopped")


if __name__ == "__main__":
    sys.exit(main())
