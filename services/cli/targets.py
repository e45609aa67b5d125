"""What commands share: where the services are, how long a call may take, and the widths of the wire's numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import typer

DEFAULT_SERVER = "127.0.0.1:50051"
DEFAULT_STORE = "127.0.0.1:50052"
DEFAULT_TIMEOUT = 300.0

UINT32_MAX = 2**32 - 1
UINT64_MAX = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Targets:
    """server, store: host:port; timeout: seconds a call may take; actor: who asks

    server_admin, store_admin: where they are administered; empty is 10 ports above
    token, token_file: what the services are shown; ca, cert, key: PEM files; without `ca` calls are in plain text
    """

    server: str = DEFAULT_SERVER
    store: str = DEFAULT_STORE
    timeout: float = DEFAULT_TIMEOUT
    actor: str = ""
    server_admin: str = ""
    store_admin: str = ""
    token: str = field(default="", repr=False)
    token_file: Path | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None


def targets(context: typer.Context) -> Targets:
    """The targets the main command put there."""
    found = context.find_object(Targets)
    assert found is not None
    return found
