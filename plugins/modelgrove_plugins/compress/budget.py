"""Which form each tensor gets so that all fit into a number of bytes and the least is lost."""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modelgrove_hub.errors import UsageError

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(%|[kKMGT]?i?B?)\s*")
_UNITS = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class Option:
    """A form that a tensor may get: its bytes, and the error that it adds to the model's output."""

    name: str
    bytes: int
    error: float


def bytes_of(size: str, whole: int) -> int:
    """What "30%" (of `whole` bytes), "1.5 GiB" or "500MB" mean.

    Raises:
        UsageError: it means nothing.
    """
    match = _SIZE.fullmatch(size)
    if match is None:
        raise UsageError(f"size {size!r} is neither a share (30%) nor a number of bytes (500MB, 1.5GiB)")
    number, unit = float(match[1]), match[2]
    if unit == "%":
        return int(whole * number / 100)
    prefix = unit.rstrip("iB")
    power = _UNITS[prefix]
    return int(number * (1024 if "i" in unit else 1000) ** power)


def assign(options: Mapping[str, Sequence[Option]], most: int) -> dict[str, Option]:
    """One option for each tensor, together at most `most` bytes.

    Errors of tensors are taken to add up. Only options on the lower convex hull of (bytes, error) are considered, and
    the step that costs the least error for each byte saved is taken until all fit: the best choice there is for the
    bytes that it ends with (Shoham & Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers").

    Raises:
        UsageError: the smallest options do not fit.
    """
    hulls = {name: _hull(choices) for name, choices in options.items()}
    least = sum(hull[-1].bytes for hull in hulls.values())
    if least > most:
        raise UsageError(f"{most:,} bytes cannot be reached: the smallest forms of all tensors take {least:,}")
    chosen = dict.fromkeys(hulls, 0)
    total = sum(hull[0].bytes for hull in hulls.values())
    steps = [(_price(hull, 0), name) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while total > most:
        _, name = heapq.heappop(steps)
        hull, place = hulls[name], chosen[name] + 1
        total -= hull[place - 1].bytes - hull[place].bytes
        chosen[name] = place
        if place + 1 < len(hull):
            heapq.heappush(steps, (_price(hull, place), name))
    return {name: hull[chosen[name]] for name, hull in hulls.items()}


def _hull(options: Sequence[Option]) -> list[Option]:
    """From the best to the smallest, each step dearer for a byte than the one before."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda one: (one.error, one.bytes)):
        if hull and option.bytes >= hull[-1].bytes:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _price(hull: Sequence[Option], place: int) -> float:
    return _slope(hull[place], hull[place + 1])


def _slope(better: Option, smaller: Option) -> float:
    return (smaller.error - better.error) / (better.bytes - smaller.bytes)
