"""What a measure of crosstalk means: the damage that was measured beside it, and what to do then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

CURVE = ((0.0, 0.0), (0.24, 0.35), (0.34, 0.39), (0.42, 0.43), (0.51, 0.48), (0.66, 0.57), (1.0, 1.0))
"""Crosstalk from weights → damage, the share of an adapter's effect that another one changes: means over fifths of 240
pairs (bench/concepts.py), between nothing in common and a copy, which doubles the effect."""
BANDS = ((0.35, "little"), (0.7, "some"))
"""Damage up to which it is called so; above it is "much"."""


def damage(pair: Mapping[str, Any]) -> float:
    """The larger damage that one of the two is expected to do to the other: measured on the base, or from weights."""
    if "damage_of_b_on_a" in pair:
        return float(max(pair["damage_of_b_on_a"], pair["damage_of_a_on_b"]))
    return max(_expected(pair["crosstalk_of_b_on_a"]), _expected(pair["crosstalk_of_a_on_b"]))


def verdict(pair: Mapping[str, Any]) -> str:
    """disjoint, little, some or much."""
    if not pair["shared_modules"]:
        return "disjoint"
    found = damage(pair)
    return next((word for most, word in BANDS if found <= most), "much")


def _expected(crosstalk: float) -> float:
    for (low, least), (high, most) in pairwise(CURVE):
        if crosstalk <= high:
            return least + (most - least) * (crosstalk - low) / (high - low)
    return CURVE[-1][1]


def suggestion(pairs: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> dict[str, Any]:
    """The method to merge with and its weights, with the reason as a sentence."""
    disturbed = [pair for pair in pairs if verdict(pair) in ("some", "much")]
    if not disturbed:
        text = "sum: the adapters hardly disturb each other"
        return {"method": "sum", "weights": list(weights), "text": text}
    worst = max(disturbed, key=damage)
    text = f"orthogonal: {worst['a']} and {worst['b']} disturb each other most ({verdict(worst)})"
    return {"method": "orthogonal", "weights": list(weights), "text": text}
