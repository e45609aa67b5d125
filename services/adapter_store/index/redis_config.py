"""Where a Redis is, checked before anything is sent to it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

from services.common.errors import InvalidArgument

DEFAULT_PREFIX = "multilora"
DEFAULT_PORT = 6379
SCHEMES = ("redis://", "rediss://")
_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


@dataclass(frozen=True, slots=True)
class RedisConfig:
    """Where the index is, and how patient to be.

    username, password: empty: the server's default user, without a password
    prefix: of every key; stores that share a server have one each
    ca_certs, certfile, keyfile: PEM files for TLS; empty: the system's authorities, and no certificate of our own
    retries: of a command, after the first try, with growing pauses
    """

    host: str
    port: int = DEFAULT_PORT
    db: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    tls: bool = False
    ca_certs: str = ""
    certfile: str = ""
    keyfile: str = ""
    prefix: str = DEFAULT_PREFIX
    connect_timeout: float = 2.0
    timeout: float = 5.0
    retries: int = 3

    @classmethod
    def parse(cls, url: str, prefix: str = "", environment: Mapping[str, str] = os.environ) -> RedisConfig:
        """From `redis[s]://user:password@host:port/db?ssl_ca_certs=FILE`; what it leaves out may be in the environment:
        REDIS_USERNAME, REDIS_PASSWORD, REDIS_CA_CERTS. Raises InvalidArgument, which never tells the password.
        """
        try:
            parts = urlsplit(url)
            query = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
            port = DEFAULT_PORT if parts.port is None else parts.port
        except ValueError:
            raise _invalid() from None
        database = re.fullmatch(r"/?([0-9]{0,5})", parts.path)
        tls = parts.scheme == "rediss"
        if not url.startswith(SCHEMES) or not parts.hostname or database is None or parts.fragment:
            raise _invalid()
        if set(query) - set(_TLS_FILES if tls else ()):
            raise _invalid()
        if not re.fullmatch(r"[A-Za-z0-9._:-]{0,64}", prefix):
            raise InvalidArgument(
                "INVALID_FLAG",
                f"--redis-prefix is {prefix!r}; up to 64 letters, digits and . _ : - are taken",
                field="--redis-prefix",
            )
        ca_certs, certfile, keyfile = (query.get(name, "") for name in _TLS_FILES)
        return cls(
            host=parts.hostname,
            port=port,
            db=int(database[1] or 0),
            username=unquote(parts.username or "") or environment.get("REDIS_USERNAME", ""),
            password=unquote(parts.password or "") or environment.get("REDIS_PASSWORD", ""),
            tls=tls,
            ca_certs=ca_certs or (environment.get("REDIS_CA_CERTS", "") if tls else ""),
            certfile=certfile,
            keyfile=keyfile,
            prefix=prefix or DEFAULT_PREFIX,
        )

    @property
    def where(self) -> str:
        """For people: without user and password."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"redis{'s' if self.tls else ''}://{host}:{self.port}/{self.db}"


def without_password(url: str) -> str:
    """Any URL, right or wrong, fit for a message."""
    return re.sub(r"//.*@", "//", url, flags=re.DOTALL).partition("?")[0]


def _invalid() -> InvalidArgument:
    return InvalidArgument(
        "INVALID_FLAG",
        # the address is not repeated: wherever it is wrong, a password may be in it
        "--index is no address of a Redis; redis://host:port/db or rediss://host:port/db is needed, with "
        "?ssl_ca_certs=, ssl_certfile= and ssl_keyfile= for the latter; user and password come before the host, with "
        "%40 for @, or from REDIS_USERNAME and REDIS_PASSWORD",
        field="--index",
    )
