"""Which tensor of one model plays the part of which in another: by name, else by what is in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from modelgrove_analyzers.heritage.facts import Facts, numel

_ALIKE = 0.9
"""Cosine of two sketches of one tensor, before and after a 4-bit quantization, is above it."""


def match(a: Facts, b: Facts) -> dict[str, str]:
    """Keys of `a` → keys of `b`, for tensors of one size.

    First equal bytes of tensors that tell something, then equal keys, then equal names in other
    folders, then the nearest sketches, then equal bytes of all the others; each is used once.
    """
    pairs: dict[str, str] = {}
    for way in (_by_telling_hash, _by_key, _by_tail, _by_sketch, _by_hash):
        left = [key for key in a.tensors if key not in pairs]
        used = set(pairs.values())
        pairs.update(way(a, b, left, [key for key in b.tensors if key not in used]))
    return pairs


def _by_telling_hash(a: Facts, b: Facts, left: Iterable[str], right: Iterable[str]) -> Iterator[tuple[str, str]]:
    return _by_hash(a, b, (key for key in left if key in a.sketches), right)


def _by_hash(a: Facts, b: Facts, left: Iterable[str], right: Iterable[str]) -> Iterator[tuple[str, str]]:
    known: dict[tuple[str, int], dict[str, None]] = defaultdict(dict)
    for key in right:
        known[b.tensors[key].sha256, numel(b.tensors[key])][key] = None
    for key in left:
        free = known[a.tensors[key].sha256, numel(a.tensors[key])]
        if free:
            # Its own key if that has these bytes too: tied tensors and constants are equal.
            other = key if key in free else next(iter(free))
            del free[other]
            yield key, other


def _by_key(a: Facts, b: Facts, left: Iterable[str], right: Iterable[str]) -> Iterator[tuple[str, str]]:
    there = set(right)
    return ((key, key) for key in left if key in there and numel(a.tensors[key]) == numel(b.tensors[key]))


def _by_tail(a: Facts, b: Facts, left: Iterable[str], right: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pairs of keys that differ in the folder alone; names that stand in several folders are left out."""
    mine, theirs = _tails(left), _tails(right)
    for tail, keys in mine.items():
        others = theirs.get(tail, [])
        if len(keys) == len(others) == 1 and numel(a.tensors[keys[0]]) == numel(b.tensors[others[0]]):
            yield keys[0], others[0]


def _tails(keys: Iterable[str]) -> dict[str, list[str]]:
    tails: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        tails[key.rpartition("/")[2]].append(key)
    return tails


def _by_sketch(a: Facts, b: Facts, left: Iterable[str], right: Iterable[str]) -> Iterator[tuple[str, str]]:
    mine, theirs = _by_size(a, left), _by_size(b, right)
    for size in mine.keys() & theirs.keys():
        keys, others = mine[size], theirs[size]
        likeness = _unit(a, keys) @ _unit(b, others).T
        for _ in range(min(len(keys), len(others))):
            row, column = np.unravel_index(int(likeness.argmax()), likeness.shape)
            if likeness[row, column] < _ALIKE:
                break
            yield keys[row], others[column]
            likeness[row, :] = likeness[:, column] = -1


def _by_size(facts: Facts, keys: Iterable[str]) -> dict[int, list[str]]:
    sizes: dict[int, list[str]] = defaultdict(list)
    for key in keys:
        if key in facts.sketches:
            sizes[numel(facts.tensors[key])].append(key)
    return sizes


def _unit(facts: Facts, keys: list[str]) -> NDArray[np.float32]:
    sketches = np.stack([np.nan_to_num(facts.sketches[key], posinf=0, neginf=0) for key in keys])
    lengths = np.linalg.norm(sketches, axis=1, keepdims=True)
    unit: NDArray[np.float32] = sketches / np.maximum(lengths, np.float32(1e-30))
    return unit
