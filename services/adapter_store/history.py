"""Who changed what, and when: the log itself, a page at a time, newest first."""

from __future__ import annotations

from services.adapter_store.catalog import check_token, page_limit
from services.adapter_store.index.interface import Index
from services.adapter_store.log.entry import Entry, decode
from services.adapter_store.log.interface import AdapterLog
from services.adapter_store.streams import adapter_stream
from services.common.auth.callers import adapter_not_found
from services.common.errors import DataLoss
from services.common.references import AdapterName


def history(
    entries: AdapterLog, index: Index, adapter: AdapterName, page_size: int, page_token: str
) -> tuple[list[tuple[int, Entry]], str]:
    """A page of entries with their seq, and the token of the next: the last seq of the page. Raises NotFound."""
    before = int(check_token(page_token)) if page_token else None
    stream = adapter_stream(adapter)
    stored = index.get(stream)
    if stored is None:
        raise adapter_not_found(adapter)
    newest = stored.seq if before is None else min(before - 1, stored.seq)
    oldest = max(newest - page_limit(page_size), 0)
    page = [(seq, _entry(entries, stream, seq)) for seq in range(newest, oldest, -1)]
    return page, str(oldest + 1) if oldest else ""


def _entry(entries: AdapterLog, stream: str, seq: int) -> Entry:
    data = entries.read(stream, seq)
    if data is None:
        raise DataLoss("LOG_HOLE", f"the log has no {stream}/{seq}, which the index knows; restore it", stream=stream)
    return decode(data, f"{stream}/{seq}")
