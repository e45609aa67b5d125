"""The client's side: what is shown to a service, and the channels that show it."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from services.common.auth.callers import authorization
from services.common.auth.guard import AUTHORIZATION
from services.common.errors import InvalidArgument

Metadata = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """ca: PEM, of the CA that signed the service's certificate; None calls in plain text, unless `tls`

    tls: with the CAs of this machine
    cert, key: PEM, shown to a service that asks for them
    token_file: read at every call, so that it can be changed under a running client
    """

    ca: Path | None = None
    tls: bool = False
    cert: Path | None = None
    key: Path | None = None
    token: str = ""
    token_file: Path | None = None

    def __repr__(self) -> str:
        return f"Credentials(ca={self.ca}, cert={self.cert}, token_file={self.token_file})"

    def channel(self, address: str, options: Sequence[tuple[str, Any]] = ()) -> grpc.Channel:
        """Raises InvalidArgument naming the file that cannot be read."""
        found = self._ssl()
        if found is None:
            return grpc.insecure_channel(address, options)
        return grpc.secure_channel(address, found, options)

    def aio_channel(self, address: str, options: Sequence[tuple[str, Any]] = ()) -> grpc.aio.Channel:
        """As `channel`."""
        found = self._ssl()
        if found is None:
            return grpc.aio.insecure_channel(address, options)
        return grpc.aio.secure_channel(address, found, options)

    def http_context(self) -> ssl.SSLContext:
        """For https. Raises InvalidArgument naming the file that is no CA, or no certificate and its key."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key)
        except (ssl.SSLError, OSError) as error:
            raise InvalidArgument("FILE_NOT_READABLE", f"{self.ca or self.cert} cannot be used: {error}") from error
        return context

    def metadata(self) -> Metadata:
        """Of every call. Raises InvalidArgument when the token's file cannot be read."""
        token = self.token if self.token_file is None else _read(self.token_file).decode().strip()
        return bearer(token) if token else ()

    def _ssl(self) -> grpc.ChannelCredentials | None:
        if self.ca is None and not self.tls and self.cert is None:
            return None
        ca, key, cert = (None if path is None else _read(path) for path in (self.ca, self.key, self.cert))
        return grpc.ssl_channel_credentials(ca, key, cert)


NONE_SHOWN = Credentials()


def callers_metadata() -> Metadata:
    """What the call being handled came with, to ask another service in the caller's name; empty when nothing."""
    given = authorization()
    return ((AUTHORIZATION, given),) if given else ()


def bearer(token: str) -> Metadata:
    if not token.isascii() or not token.isprintable():
        raise InvalidArgument("INVALID_TOKEN", "the token has characters that none has; look at where it comes from")
    return ((AUTHORIZATION, f"Bearer {token}"),)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgument("FILE_NOT_READABLE", f"{path} cannot be read: {error.strerror}") from error
