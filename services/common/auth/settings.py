"""The flags of both services about who may call, and what follows from them."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

from services.common.auth.audit import Audit
from services.common.auth.guard import Guard
from services.common.auth.tls import Tls
from services.common.auth.tokens import Tokens
from services.common.errors import InvalidArgument

ADMIN_PORT_OFFSET = 10
"""The port of administration is so far above the service's, unless it is named."""
SAME_PORT = -1

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """Who may call, and what is kept of it. Raises InvalidArgument naming the flag.

    tls_cert, tls_key: PEM files; None serves plain text
    tls_client_ca: clients must show a certificate it signed
    tokens: the file of who may call; None asks for none
    audit_log: file that changes are appended to, `-` for standard error; empty keeps none
    insecure: take calls from elsewhere though nobody is asked who they are
    health_port: of gRPC health alone, in plain text, for probes; None: only where everything else is
    """

    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    tokens: Path | None = None
    audit_log: str = ""
    insecure: bool = False
    health_port: int | None = None

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise _invalid("--tls-cert", "and --tls-key go together; give both")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise _invalid("--tls-client-ca", "needs --tls-cert and --tls-key; give them too")
        if self.health_port is not None and not 0 < self.health_port <= 65535:
            raise _invalid("--health-port", f"is {self.health_port}; it must be 1 to 65535")

    def check_host(self, host: str) -> None:
        """Raise InvalidArgument when anybody elsewhere could call without being asked who they are."""
        if is_loopback(host):
            return
        if self.tokens is None and self.tls_client_ca is None and not self.insecure:
            raise _invalid(
                "--host",
                f"is {host}, and anybody who reaches it could call; give --tokens FILE (multilora tokens create makes "
                "one) or --tls-client-ca FILE, or say --insecure",
            )
        if self.tls_cert is None and not self.insecure:
            log.warning(
                "tokens and answers travel in plain text; give --tls-cert and --tls-key, or see to it otherwise"
            )

    def health_address(self, host: str) -> str | None:
        where = f"[{host}]" if ":" in host else host
        return None if self.health_port is None else f"{where}:{self.health_port}"

    def tls(self) -> Tls | None:
        if self.tls_cert is None or self.tls_key is None:
            return None
        return Tls(self.tls_cert, self.tls_key, self.tls_client_ca)

    def guard(self, service: str) -> Guard | None:
        """None where there is nothing to check or keep: calls then cost nothing. service: as the record names it."""
        if self.tokens is None and self.tls_client_ca is None and not self.audit_log:
            return None
        tokens = Tokens(self.tokens) if self.tokens is not None else None
        audit = Audit(self.audit_log, service) if self.audit_log else None
        return Guard(tokens, audit, certificates=self.tls_client_ca is not None)

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        path = "FILE"
        _add(parser, "--tls-cert", "certificate to show, PEM; none: plain text", path)
        _add(parser, "--tls-key", "its private key, PEM", path)
        _add(parser, "--tls-client-ca", "CA, PEM, of which every client must show a certificate", path)
        _add(
            parser, "--tokens", "who may call, TOML or JSON (multilora tokens create); read again when it changes", path
        )
        _add(parser, "--audit-log", "append a line for every change; - is standard error", path)
        parser.add_argument(
            "--health-port", type=int, help="of gRPC health alone, in plain text: for probes, which speak no TLS"
        )
        parser.add_argument(
            "--insecure",
            action="store_true",
            default=os.environ.get("MULTILORA_INSECURE", "") not in ("", "0", "false"),
            help="be reached from elsewhere without asking who calls ($MULTILORA_INSECURE)",
        )

    @classmethod
    def of_flags(cls, flags: argparse.Namespace) -> Self:
        """Takes its own out of what was parsed."""
        values = vars(flags)
        found = {field.name: values.pop(field.name) for field in fields(cls)}
        paths = {name: Path(text) if text else None for name, text in found.items() if isinstance(text, str)}
        return cls(**found | paths | {"audit_log": found["audit_log"]})


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def admin_port(asked: int | None, port: int) -> int:
    """The port of administration: the one asked for, or the service's own plus 10, or any free one as that is."""
    if asked is not None:
        return asked
    return port + ADMIN_PORT_OFFSET if port else 0


def admin_address(address: str) -> str:
    """Where the service at `host:port` is administered, unless it was told otherwise."""
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + ADMIN_PORT_OFFSET}" if port.isdigit() else address


def _add(parser: argparse.ArgumentParser, flag: str, text: str, metavar: str) -> None:
    variable = f"MULTILORA_{flag.removeprefix('--').replace('-', '_').upper()}"
    default = os.environ.get(variable, "")
    parser.add_argument(flag, default=default, metavar=metavar, help=f"{text} (default: ${variable})")


def _invalid(flag: str, what: str) -> InvalidArgument:
    return InvalidArgument("INVALID_FLAG", f"{flag} {what}", field=flag)
