"""Progress on standard error: what runs now, and how long what ran before took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console

console = Console(stderr=True)
if not console.is_terminal:
    console = Console(stderr=True, width=160)


@contextlib.contextmanager
def says(what: str) -> Iterator[None]:
    began = time.monotonic()
    with console.status(what):
        yield
    console.print(f"{time.monotonic() - began:6.1f} s  {what}", highlight=False)
