"""The file of tokens: who may call, by the sha256 of a bearer token or by the name in a client certificate.

    [[tokens]]
    name = "ci"                  # stands in histories and the audit record
    role = "publisher"           # admin, publisher, reader or replica
    tenant = "acme"              # `*`: every tenant
    sha256 = "…"                 # 64 hex digits; or certificate = "its common name"
    expires = 2027-01-01T00:00:00Z    # optional

    [limits]                     # of every tenant that has none of its own; see limits.py
    concurrency = 16
    [tenants.acme]
    requests_per_second = 20

A token is 256 random bits, so its hash needs no salt and no slow function: there is nothing to guess. It is looked up
by that hash, which costs the same whether there is such a token or not, and tells nothing of the others.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import time
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from services.common.auth.callers import EVERY_TENANT, Caller
from services.common.auth.limits import Budget, Limits
from services.common.auth.permissions import Role
from services.common.errors import InvalidArgument
from services.common.references import check_name

LOOK_SECONDS = 1.0
"""How old what is known of the file may be: a token that is taken out is refused within this time."""
TOKEN_PREFIX = "mlt_"
_TOKEN_BYTES = 32
_FIELDS = {"name", "role", "tenant", "sha256", "certificate", "expires"}
_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9._@]{0,62})")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """Somebody who may call. digest: of their token; empty for a certificate's; expires: seconds since 1970, or inf"""

    caller: Caller
    digest: bytes = field(repr=False)
    certificate: str = ""
    expires: float = float("inf")


_MISS = Entry(Caller("", Role.READER, ""), bytes(32), expires=-float("inf"))


def digest_of(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


class Tokens:
    """What the file says. It is looked at again as it changes; one that cannot be read leaves what was known."""

    def __init__(self, path: Path) -> None:
        """Raises InvalidArgument that says what is wrong with the file."""
        self._path = path
        self._budgets: dict[str, Budget] = {}
        self._seen = _stamp(path)
        self._looked_at = time.monotonic()
        self._take(_read(path))

    def by_token(self, token: str) -> Caller | None:
        """Whose token it is; None for nobody's, and for one that has expired."""
        self._look()
        digest = digest_of(token)
        entry = self._by_digest.get(digest, _MISS)
        same, lives = hmac.compare_digest(entry.digest, digest), entry.expires > time.time()
        return entry.caller if same and lives else None

    def by_certificate(self, names: list[str]) -> Caller | None:
        """Whose certificate has one of these names."""
        self._look()
        for name in names:
            entry = self._by_certificate.get(name, _MISS)
            if entry.expires > time.time():
                return entry.caller
        return None

    def limits(self, tenant: str) -> Limits:
        self._look()
        return self._limits.get(tenant, self._default_limits)

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        stamp = _stamp(self._path)
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._take(_read(self._path))
        except InvalidArgument as error:
            log.error("%s; what it said before stays in force", error.message)
        else:
            log.info("%s was read again: %d may call", self._path, len(self._by_digest) + len(self._by_certificate))

    def _take(self, content: Mapping[str, Any]) -> None:
        default, by_tenant, entries = _parse(self._path, content)
        self._default_limits, self._limits = default, by_tenant
        entries = [self._with_budget(entry) for entry in entries]
        self._by_digest = {entry.digest: entry for entry in entries if entry.digest}
        self._by_certificate = {entry.certificate: entry for entry in entries if entry.certificate}

    def _with_budget(self, entry: Entry) -> Entry:
        """With its tenant's budget, which outlives a change of the file unless its limits change."""
        who = entry.caller
        if who.every_tenant:
            return entry
        limits = self._limits.get(who.tenant, self._default_limits)
        budget = self._budgets.get(who.tenant)
        if budget is None or budget.limits != limits:
            budget = self._budgets[who.tenant] = Budget(who.tenant, limits)
        with_budget = Caller(who.name, who.role, who.tenant, budget)
        return Entry(with_budget, entry.digest, entry.certificate, entry.expires)


def add_token(path: Path, *, name: str, role: Role, tenant: str, expires: datetime | None = None) -> str:
    """Make a token, append its hash to the file, which is made when there is none, and return it: it is kept nowhere.

    Raises InvalidArgument, and leaves the file as it was, when it would not be taken.
    """
    token = TOKEN_PREFIX + secrets.token_urlsafe(_TOKEN_BYTES)
    row: dict[str, Any] = {"name": name, "role": str(role), "tenant": tenant, "sha256": digest_of(token).hex()}
    content = _read(path) if path.exists() else {}
    shown = row | ({"expires": expires.isoformat()} if expires is not None else {})
    changed = {**content, "tokens": [*content.get("tokens", []), shown]}
    _parse(path, changed)
    if path.suffix == ".json":
        text = json.dumps(changed, indent=2, default=str) + "\n"
    else:
        before = path.read_text() if path.exists() else ""
        lines = [f"{key} = {json.dumps(value)}" for key, value in row.items()]
        lines += [f"expires = {expires.isoformat()}"] if expires is not None else []
        text = before + ("\n" if before else "") + "\n".join(["[[tokens]]", *lines]) + "\n"
    _replace(path, text)
    return token


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)
    beside.replace(path)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text()
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise _invalid(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        # the parsers quote at most a character
        raise _invalid(path, f"is no {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from error
    if not isinstance(content, dict):
        raise _invalid(path, "is no table of tokens, limits and tenants")
    return content


def _parse(path: Path, content: Mapping[str, Any]) -> tuple[Limits, dict[str, Limits], list[Entry]]:
    if unknown := set(content) - {"tokens", "limits", "tenants"}:
        raise _invalid(path, f"has {', '.join(sorted(unknown))}; there are tokens, limits and tenants")
    rows, tenants = content.get("tokens", []), content.get("tenants", {})
    if not isinstance(rows, list) or not isinstance(tenants, dict):
        raise _invalid(path, "tokens must be a list, as [[tokens]], and tenants a table of tables, as [tenants.acme]")
    entries = [_entry(path, f"token {number}", row) for number, row in enumerate(rows, 1)]
    names = [entry.caller.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise _invalid(path, f"has the name {name!r} twice; a name stands for one token")
    default = _limits(path, "limits", content.get("limits", {}))
    return default, {str(name): _limits(path, f"tenants.{name}", row) for name, row in tenants.items()}, entries


def _entry(path: Path, where: str, row: Any) -> Entry:
    if not isinstance(row, dict) or set(row) - _FIELDS:
        raise _invalid(path, f"{where} must have {', '.join(sorted(_FIELDS))} and nothing else")
    name, tenant, digest, certificate = (row.get(key, "") for key in ("name", "tenant", "sha256", "certificate"))
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _invalid(path, f"{where} needs a name of 1 to 63 letters, digits and '-._@'")
    where = f"token {name!r}"
    if row.get("role") not in list(Role):
        raise _invalid(path, f"{where}: role must be {', '.join(Role)}")
    role = Role(row["role"])
    if tenant != EVERY_TENANT:
        try:
            check_name(str(tenant), field="tenant", what="tenant")
        except InvalidArgument as error:
            raise _invalid(path, f"{where}: {error.message}; `*` is every tenant") from error
        if role is Role.REPLICA:
            raise _invalid(path, f"{where}: a replica serves every tenant, so its tenant must be `*`")
    if bool(digest) == bool(certificate):
        raise _invalid(path, f"{where} must have either sha256 or certificate")
    if digest and not (isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest)):
        raise _invalid(path, f"{where}: sha256 must be 64 lower-case hex digits; `multilora tokens create` makes one")
    caller = Caller(name, role, str(tenant))
    return Entry(caller, bytes.fromhex(digest), str(certificate), _expires(path, where, row.get("expires")))


def _expires(path: Path, where: str, value: Any) -> float:
    if value is None:
        return float("inf")
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else value
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, AttributeError) as error:
        raise _invalid(path, f"{where}: expires must be a time, as 2027-01-01T00:00:00Z") from error


def _limits(path: Path, where: str, row: Any) -> Limits:
    known = asdict(Limits())
    if not isinstance(row, dict) or set(row) - set(known):
        raise _invalid(path, f"{where} may have {', '.join(known)} and nothing else")
    for key, value in row.items():
        whole = isinstance(known[key], int)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not 0 <= value < 2**63:
            raise _invalid(
                path, f"{where}: {key} must be a{' whole' if whole else ''} number, 0 or more; 0 is no limit"
            )
    return Limits(**row)


def _invalid(path: Path, what: str) -> InvalidArgument:
    return InvalidArgument("INVALID_TOKENS_FILE", f"--tokens: {path} {what}", field="--tokens")
