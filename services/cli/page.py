"""How many adapters a replica has in use, read off its own /metrics as time goes by: where no Prometheus keeps them."""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from services.cli.usage import WINDOW_SECONDS, Sample
from services.common.auth.credentials import Credentials
from services.common.errors import FailedPrecondition, PermissionDenied, Unavailable

READ_SECONDS = 5.0

_SERIES = re.compile(r"^multilora:(requests_total|lora_requests_by_adapter)\{(.*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_REST = "*"
"""The tenant of what has no series of its own; the base model's is empty."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The page at one time (unix seconds). begun: requests so far, by adapter; now: those there are

    others: requests so far for adapters without series of their own
    """

    at: float
    begun: dict[str, float]
    now: dict[str, float]
    others: float


def is_page(place: str) -> bool:
    """Whether `place` is a service's own page; any other URL is a Prometheus's."""
    return place.startswith(("http://", "https://")) and urllib.parse.urlsplit(place).path.endswith("/metrics")


def watch(url: str, seconds: float, credentials: Credentials) -> list[Sample]:
    """What is in use from now on, for so long. Raises Unavailable, PermissionDenied, FailedPrecondition."""
    return list(samples_of(urllib.parse.urlsplit(url).netloc, _readings(url, seconds, credentials)))


def samples_of(instance: str, readings: Iterable[Reading]) -> Iterator[Sample]:
    """One of each: a number of requests that is another than a window ago, or before a restart, was asked for since."""
    window: deque[Reading] = deque()
    for reading in readings:
        window.append(reading)
        while len(window) > 1 and window[1].at <= reading.at - WINDOW_SECONDS:
            window.popleft()
        begin = window[0]
        asked = sum(count != begin.begun.get(adapter, 0.0) for adapter, count in reading.begun.items())
        at_once = sum(count > 0 for count in reading.now.values())
        yield Sample(reading.at, instance, asked, at_once, max(reading.others - begin.others, 0.0))


def parse(page: str, at: float) -> Reading:
    """Raises FailedPrecondition when it is no inference service's."""
    counts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    others = 0.0
    for name, text, value in _SERIES.findall(page):
        labels = dict(_LABEL.findall(text))
        if labels["tenant"] == _REST:
            others += float(value) if name == "requests_total" else 0.0
        elif labels["tenant"]:
            counts[name][labels["adapter"]] += float(value)
    if "multilora:lora_requests_by_adapter" not in page:
        raise FailedPrecondition("NO_METRICS", "the page has no metrics of an inference service; give its URL")
    return Reading(at, counts["requests_total"], counts["lora_requests_by_adapter"], others)


def _readings(url: str, seconds: float, credentials: Credentials) -> Iterator[Reading]:
    end = time.monotonic() + seconds
    while True:
        yield parse(_read(url, credentials), time.time())
        left = end - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(READ_SECONDS, left))


def _read(url: str, credentials: Credentials) -> str:
    request = urllib.request.Request(url, headers={key: str(value) for key, value in credentials.metadata()})
    context = credentials.http_context() if url.startswith("https://") else None
    try:
        with urllib.request.urlopen(request, timeout=60, context=context) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            if error.code in (401, 403):
                raise PermissionDenied(
                    "NOT_PERMITTED", f"{url} answers {error.code}; give a token of tenant `*`: --token-file"
                ) from error
            raise FailedPrecondition("NO_METRICS", f"{url} answers {error.code}; give a service's /metrics") from error
    except OSError as error:
        raise Unavailable("METRICS_AWAY", f"{url} does not answer: {error}") from error
