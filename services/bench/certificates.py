"""A throw-away authority and certificates of it, made by the `openssl` command, for demos and tests."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

DAYS = 2
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True, slots=True)
class Pair:
    """PEM files."""

    cert: Path
    key: Path


class Authority:
    """Its own certificate is `ca`; what it issues is for this machine's loopback."""

    def __init__(self, directory: Path) -> None:
        """Raises RuntimeError without the command."""
        if shutil.which("openssl") is None:
            raise RuntimeError("the command openssl is missing; install it (apt-get install openssl)")
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self.ca = directory / "ca.pem"
        usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
        self._openssl("req", "-x509", *_NEW_KEY, *_days(DAYS), "-subj", "/CN=ca", *usage, out=("ca.key", "ca.pem"))

    def issue(self, name: str, *, days: int = DAYS) -> Pair:
        """A certificate whose common name is `name`; with negative days, one that has expired."""
        self._openssl("req", *_NEW_KEY, "-subj", f"/CN={name}", out=(f"{name}.key", f"{name}.csr"))
        (self._directory / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names")
        self._openssl("x509", "-req", "-in", f"{name}.csr", *signed, *_days(days), out=("", f"{name}.pem"))
        return Pair(self._directory / f"{name}.pem", self._directory / f"{name}.key")

    def _openssl(self, *arguments: str, out: tuple[str, str]) -> None:
        key, written = out
        keyout = ("-keyout", key) if key else ()
        command = ["openssl", *arguments, *keyout, "-out", written]
        subprocess.run(command, cwd=self._directory, check=True, capture_output=True)


def _days(days: int) -> tuple[str, ...]:
    return ("-days", str(days))
