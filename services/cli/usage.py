"""How many adapters each replica had in use, over time: asked of Prometheus, or read from a file of such samples.

`page.py` reads them off a replica itself.
"""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from services.common.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable

WINDOW_SECONDS = 300
WINDOW = f"{WINDOW_SECONDS}s"
SPARE_SLOTS = 2
SPARE_SHARE = 0.2
MOST_SAMPLES = 2000
"""Of a replica, in one question: Prometheus refuses more than 11,000."""

_ADAPTERS = 'tenant!~"|\\\\*"'  # neither the base model, which has no tenant, nor what has no series of its own
_REST = 'tenant="*"'
_REQUESTS = f"multilora:requests_total{{{_ADAPTERS}}}"
# `increase` does not see the first request for an adapter, with which its series begins: what a replica that was there
# before the window had no series of then is new, too.
_BEGUN = f"{_REQUESTS} > 0 unless {_REQUESTS} offset {WINDOW} and on (instance) multilora:steps_total offset {WINDOW}"
_ASKED = f"increase({_REQUESTS}[{WINDOW}]) > 0 or {_BEGUN}"
IN_WINDOW = f"count by (instance) (count by (instance, adapter) ({_ASKED}))"
_AT_ONCE = f"count by (instance) (sum by (instance, adapter) (multilora:lora_requests_by_adapter{{{_ADAPTERS}}}) > 0)"
_OTHERS = f"sum by (instance) (increase(multilora:requests_total{{{_REST}}}[{WINDOW}]))"


@dataclass(frozen=True, slots=True)
class Sample:
    """One replica at one time (unix seconds).

    in_window: adapters asked for in the WINDOW before; at_once: adapters with requests then
    others: requests in the window for adapters that had no series of their own
    """

    at: float
    instance: str
    in_window: int = 0
    at_once: int = 0
    others: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What the busiest replica wants. window, peak: the most adapters in a WINDOW, and at once."""

    window: int
    peak: int
    max_loras: int
    max_cpu_loras: int
    blind: bool
    """Whether adapters without series of their own were asked for, so that these are least numbers."""


def plan(samples: Iterable[Sample]) -> Plan:
    """Slots for what is in use at once, memory for what comes back within minutes; with room to spare for each."""
    samples = list(samples)
    window, peak = max(each.in_window for each in samples), max(each.at_once for each in samples)
    max_loras = peak + SPARE_SLOTS
    kept = max(window, peak)
    max_cpu_loras = max(math.ceil(kept * (1 + SPARE_SHARE)), max_loras)
    return Plan(window, peak, max_loras, max_cpu_loras, any(each.others > 0 for each in samples))


def read_samples(place: str, hours: float) -> list[Sample]:
    """From http(s)://host of a Prometheus, or a file of `write_samples`."""
    return _ask_all(place, hours) if place.startswith(("http://", "https://")) else _read(Path(place))


def in_use(place: str, samples: list[Sample]) -> list[Sample]:
    """The samples. Raises NotFound when they tell of no adapter."""
    if not any(each.in_window or each.at_once or each.others for each in samples):
        raise NotFound("NO_USAGE", f"{place} knows no request for an adapter; is it what serves, or scrapes, these?")
    return samples


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    path.write_text("".join(f"{json.dumps(asdict(sample))}\n" for sample in samples))


def _read(path: Path) -> list[Sample]:
    try:
        return [Sample(**json.loads(line)) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, TypeError, ValueError) as error:
        raise InvalidArgument(
            "INVALID_USAGE", f"--from-metrics: {path} is no file that --save wrote: {error}", field="--from-metrics"
        ) from error


def _ask_all(url: str, hours: float) -> list[Sample]:
    end = time.time()
    step = max(math.ceil(hours * 3600 / MOST_SAMPLES), 15)
    span = {"start": end - hours * 3600 // step * step, "end": end, "step": step}  # so that the last is now
    found: dict[tuple[float, str], dict[str, Any]] = {}
    for name, query in (("in_window", IN_WINDOW), ("at_once", _AT_ONCE), ("others", _OTHERS)):
        for series in _ask(url, {"query": query, **span}):
            instance = series["metric"].get("instance", "")
            for at, value in series["values"]:
                number = float(value) if name == "others" else int(float(value))
                found.setdefault((float(at), instance), {})[name] = number
    return [Sample(at, instance, **values) for (at, instance), values in sorted(found.items())]


def _ask(url: str, arguments: dict[str, Any]) -> Sequence[dict[str, Any]]:
    """Raises Unavailable when nobody answers, FailedPrecondition when what answers is no Prometheus."""
    address = f"{url.rstrip('/')}/api/v1/query_range?{urllib.parse.urlencode(arguments)}"
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            return list(json.load(answer)["data"]["result"])
    except urllib.error.HTTPError as error:
        with error:
            raise FailedPrecondition("NO_PROMETHEUS", f"{url} answers {error.code}; give a Prometheus's URL") from error
    except (KeyError, TypeError, ValueError) as error:
        raise FailedPrecondition("NO_PROMETHEUS", f"{url} does not answer as Prometheus does: {error}") from error
    except OSError as error:
        raise Unavailable("METRICS_AWAY", f"{url} does not answer: {error}") from error
