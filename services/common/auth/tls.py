"""The certificate a service shows, and the CA whose clients alone it takes; both are read again when they change."""

from __future__ import annotations

import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from services.common.errors import InvalidArgument

log = logging.getLogger(__name__)

Stamps = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files. client_ca: None takes clients without a certificate.

    Raises InvalidArgument naming the flag, and what is wrong with the file.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None

    def __post_init__(self) -> None:
        for flag, path in (("--tls-cert", self.cert), ("--tls-key", self.key), ("--tls-client-ca", self.client_ca)):
            if path is not None:
                _read(flag, path)
        try:
            context = self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        except (ssl.SSLError, OSError) as error:
            raise _invalid(
                "--tls-cert", f"{self.cert} and {self.key} are no certificate and its key, in PEM: {error}"
            ) from error
        if reason := _why_not_valid(context, self.cert):
            raise _invalid("--tls-cert", f"{self.cert}: {reason}; put a valid one there")

    def server_credentials(self) -> grpc.ServerCredentials:
        """For gRPC: every handshake shows what the files hold then."""
        lock, seen = threading.Lock(), [self._stamps()]

        def changed() -> Any:
            with lock:
                stamps = self._stamps()
                if stamps == seen[0]:
                    return None
                seen[0] = stamps
            try:
                Tls(self.cert, self.key, self.client_ca)
                return self._configuration()
            except (InvalidArgument, OSError) as error:
                log.error("the certificate was not taken anew: %s", error)
                return None

        return grpc.dynamic_ssl_server_credentials(
            self._configuration(), changed, require_client_authentication=self.client_ca is not None
        )

    def http_context(self) -> ssl.SSLContext:
        """For HTTP: the first handshake after a change loads the files, the next ones show them."""
        context, seen = self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)), [self._stamps()]

        def look(_socket: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            stamps = self._stamps()
            if stamps != seen[0]:
                seen[0] = stamps
                try:
                    Tls(self.cert, self.key, self.client_ca)
                    self._load(context)
                except (InvalidArgument, OSError) as error:
                    log.error("the certificate was not taken anew: %s", error)

        context.sni_callback = look  # called where the client names nobody, too
        return context

    def _load(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.cert, self.key, password=_no_password)
        if self.client_ca is not None:
            context.load_verify_locations(self.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        ca = self.client_ca.read_bytes() if self.client_ca is not None else None
        return grpc.ssl_server_certificate_configuration([(self.key.read_bytes(), self.cert.read_bytes())], ca)

    def _stamps(self) -> Stamps:
        try:
            found = [path.stat() for path in (self.cert, self.key, self.client_ca) if path is not None]
        except OSError:
            return ()
        return tuple((each.st_mtime_ns, each.st_size, each.st_ino) for each in found)


def _no_password() -> str:
    """Instead of a prompt that nobody would answer."""
    raise ssl.SSLError("the key is encrypted; give one that is not")


def _why_not_valid(context: ssl.SSLContext, cert: Path) -> str:
    """Empty when the certificate may be shown now: found out by a handshake with ourselves, in memory."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(cert)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = context.wrap_bio(to_server, to_client, server_side=True)
    theirs = client.wrap_bio(to_client, to_server)
    for side in (theirs, ours, theirs):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError as error:
            return error.verify_message
    return ""


def _read(flag: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _invalid(flag, f"{path} cannot be read: {error.strerror}") from error


def _invalid(flag: str, what: str) -> InvalidArgument:
    return InvalidArgument("INVALID_FLAG", f"{flag}: {what}", field=flag)
