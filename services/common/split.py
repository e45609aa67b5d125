"""How a weighted alias picks a version: the same everywhere, in the store and on every replica.

The sha256 of `tenant/name:alias`, a zero byte and the routing key, its first 8 bytes as a big-endian number, scaled to
the sum of the weights, is a point on a line; the targets lie on that line by version number, each as long as its
weight. So a key stays with its version, and moving 90:10 to 80:20 moves a tenth of the keys.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

_HASH_BITS = 64


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """A version and its share of an alias; weights need not sum to anything."""

    version: int
    weight: int = 1


def pick(targets: Sequence[Target], alias: str, routing_key: str) -> int:
    """The version of `alias` (full, `tenant/name:alias`) that a routing key means; a random one for an empty key.

    `targets` is not empty, its weights are 1 or more; its order does not matter.
    """
    if len(targets) == 1:
        return targets[0].version
    if routing_key:
        digest = hashlib.sha256(f"{alias}\0{routing_key}".encode()).digest()
        fraction = int.from_bytes(digest[: _HASH_BITS // 8], "big")
    else:
        fraction = secrets.randbits(_HASH_BITS)
    point = fraction * sum(target.weight for target in targets) >> _HASH_BITS
    for target in sorted(targets):
        point -= target.weight
        if point < 0:
            return target.version
    raise AssertionError(f"the point lies beyond {targets}")
