"""Who came from whom among checkpoints of one tree, from sampled values and norms: no weights are read.

Samples stand at the same places in every model, so a model is a point, and squared distances between points estimate
those between all weights. A model is near its parent (Model Atlas, arXiv 2503.10633, section 5: the nearest earlier
neighbour), but siblings that learned alike are nearer to each other than to what they came from. What tells a chain
from a fan is what is kept: a descendant has all that its ancestor learned, a sibling never had it. So the parent is
the nearest earlier model of which the child keeps what it learned, and what each of its ancestors learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from modelgrove_analyzers.heritage.facts import Facts, numel
from modelgrove_analyzers.heritage.matching import match

GAIN = 0.3
"""Share of the squared distance to the nearest model that a merge must explain; below it none is thought of."""
EXACT_GAIN = 0.98
"""From here on it is called: between the two lie merges that were trained further, and siblings that learned alike."""
KEPT = 0.9
"""Share of what a model learned that its descendants keep: of grown fine-tunes 95 % keep more."""
_LARGEST_MERGE = 6
_LEAST_SHARE = 0.02
_CANDIDATES = 64
"""Models that a merge may be made of, the nearest first."""
_SHARED = 0.5
"""Share of the parameters that a model must have in common with the first to be compared."""

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Space:
    """Models as points, in the order in which they were given."""

    points: Vector
    """(N, n): each sample times √(elements / samples) of its tensor."""
    energy: Vector
    """(N,): squared norms of all tensors that were sampled."""

    def of(self, numbers: Sequence[int]) -> Space:
        """Some of the models."""
        return Space(self.points[list(numbers)], self.energy[list(numbers)])

    def from_one(self, number: int) -> Vector:
        """(N,) squared distances of all models from one."""
        found: Vector = np.square(self.points - self.points[number]).sum(1)
        return found


@dataclass(frozen=True)
class Origin:
    """Where one model comes from. `parent` is its place among those given; None: from none of them."""

    parent: int | None
    members: Mapping[int, float] = field(default_factory=dict)
    """Of a merge: member → weight; the parent is the one with the largest weight."""
    probability: float = 0.0
    """That the parent is right."""
    relative: float = 0.0
    """Distance to the parent over the norm of the weights."""
    kept: float | None = None
    """Share of what the parent had learned that is in it; None if the parent learned nothing here."""
    passed_over: float | None = None
    """The largest share that it keeps of a nearer model that is not its parent; None if the nearest is the parent."""
    gain: float = 0.0
    """Share of the squared distance to the nearest model that a mix of earlier ones explains."""


def space_of(models: Sequence[Facts]) -> tuple[Space, list[int]]:
    """Points of the models that have half of the first one's parameters or more; and which models those are.

    Tensors are paired with those of the first model by name, else by what is in them.
    """
    first = models[0]
    pairs = [match(first, other) for other in models]
    whole = sum(numel(first.tensors[key]) for key in first.sketches)
    shared = [sum(numel(first.tensors[key]) for key in first.sketches if key in found) for found in pairs]
    kept = [number for number, count in enumerate(shared) if count >= _SHARED * whole]
    keys = [key for key in first.sketches if all(_sampled(models[n], pairs[n].get(key)) for n in kept)]
    rows, energy = [], []
    for number in kept:
        found = [models[number].tensors[pairs[number][key]] for key in keys]
        scaled = [row.sketch.astype(np.float64) * sqrt(numel(row) / row.sketch.size) for row in found]
        rows.append(np.concatenate(scaled or [np.zeros(0)]))
        energy.append(sum(float(row.norm or 0.0) ** 2 for row in found))
    return Space(np.stack(rows), np.array(energy)), kept


def find_origins(
    space: Space, times: Sequence[float | None] | None = None, root: int | None = None, slack: float = 0.0
) -> list[Origin]:
    """The origin of each model.

    Args:
        space: the models.
        times: of each, in any unit. Models whose times differ by `slack` or less, from one to the next, are taken
            for simultaneous; so are all without a time.
        root: the model that all others come from; None: the first in time, and among simultaneous ones the one with
            the smallest norm, as training makes weights grow.
        slack: in the unit of `times`.

    Costs N distances and one small least-squares fit for each of the N models.
    """
    groups = _groups(times or [None] * len(space.points), slack)
    if root is None:
        root = min(range(len(space.points)), key=lambda number: (groups[number], space.energy[number]))
    away = space.from_one(root)
    order = sorted(range(len(space.points)), key=lambda n: (n != root, groups[n], away[n]))
    mixes = {n: mix for n in order[1:] if (mix := _fit_mix(space, n, _not_later(n, groups)))}
    exact = {n: mix for n, mix in mixes.items() if mix.gain >= EXACT_GAIN}
    # Of members that another merge has too, that merge explains as much: the members themselves are meant.
    for number in exact:
        simple = _fit_mix(space, number, [other for other in _not_later(number, groups) if other not in exact])
        if simple and simple.gain >= EXACT_GAIN:
            exact[number] = simple
    found = {root: Origin(None)}
    for number in _after_members(order[1:], exact):
        merge = exact.get(number)
        timed = groups[root] != groups[number]
        found[number] = (
            _describe_merge(space, number, merge) if merge
            else _find_parent(space, number, found, mixes.get(number), timed=timed)
        )  # fmt: skip
    return [found[number] for number in range(len(space.points))]


def kept_share(space: Space, child: int, ancestor: int, before: int) -> float:
    """The share of what `ancestor` learned since `before` that is in `child`: a projection, so it may exceed one."""
    learned = space.points[ancestor] - space.points[before]
    size = float(learned @ learned)
    return float((space.points[child] - space.points[before]) @ learned) / size if size else 1.0


def relation(origins: Sequence[Origin], one: int, other: int) -> str:
    """What two models of a tree are to each other, in one word or two."""
    mine, theirs = _ancestors(origins, one), _ancestors(origins, other)
    if other in mine:
        return "parent" if origins[one].parent == other or other in origins[one].members else "ancestor"
    if one in theirs:
        return "child" if origins[other].parent == one or one in origins[other].members else "descendant"
    siblings = origins[one].parent is not None and origins[one].parent == origins[other].parent
    return "sibling" if siblings else "same family"


def _sampled(facts: Facts, key: str | None) -> bool:
    return key is not None and bool(facts.tensors[key].samples) and bool(np.isfinite(facts.tensors[key].sketch).all())


def _groups(times: Sequence[float | None], slack: float) -> list[int]:
    """The rank of each model's time, the same for simultaneous ones; all the same if any has no time."""
    if any(time is None for time in times):
        return [0] * len(times)
    known = [float(time or 0) for time in times]
    ranks, rank, last = [0] * len(known), 0, None
    for number in sorted(range(len(known)), key=known.__getitem__):
        rank += last is not None and known[number] - last > slack
        ranks[number], last = rank, known[number]
    return ranks


def _not_later(number: int, groups: Sequence[int]) -> list[int]:
    return [other for other in range(len(groups)) if other != number and groups[other] <= groups[number]]


def _after_members(order: Sequence[int], merges: Mapping[int, Origin]) -> list[int]:
    """The same order with each merge behind its members; one that would be a member of its own members is left."""
    placed: list[int] = []
    waiting = list(order)
    while waiting:
        ready = next((n for n in waiting if n not in merges or not set(merges[n].members) & set(waiting)), waiting[0])
        placed.append(ready)
        waiting.remove(ready)
    return placed


def _fit_mix(space: Space, number: int, candidates: Sequence[int]) -> Origin | None:
    """The mix of candidates that is nearest, weights summing to one; None if it gains less than `GAIN`.

    Non-negative weights choose the members, and these alone are fitted again.
    """
    away = space.from_one(number)
    near = sorted(candidates, key=away.__getitem__)[:_CANDIDATES]
    if len(near) < 2 or not away[near[0]]:
        return None
    start = space.points[near[0]]
    target = space.points[number] - start
    rows = np.stack([space.points[other] - start for other in near], axis=1)
    heavy = 1e3 * float(np.linalg.norm(rows, axis=0).max())  # of the row that makes weights sum to one
    weights, _ = nnls(np.vstack([rows, np.full((1, len(near)), heavy)]), np.append(target, heavy))
    largest = [int(i) for i in np.argsort(-weights) if weights[i] > _LEAST_SHARE][:_LARGEST_MERGE]
    members = [near[i] for i in largest]
    if len(members) < 2:
        return None
    shares = _sum_to_one(space, number, members)
    rest = space.points[number] - np.asarray(shares) @ space.points[members]
    gain = 1 - float(rest @ rest) / float(away[near[0]])
    mix = dict(zip(members, shares, strict=True))
    return Origin(members[0], mix, gain=gain) if gain >= GAIN and min(shares) > _LEAST_SHARE else None


def _sum_to_one(space: Space, number: int, members: Sequence[int]) -> list[float]:
    """Least squares for the model's point, the first member's weight being what the others leave of one."""
    first = space.points[members[0]]
    columns = np.stack([space.points[member] - first for member in members[1:]], axis=1)
    others = np.linalg.lstsq(columns, space.points[number] - first, rcond=None)[0]
    return [1 - float(others.sum()), *map(float, others)]


def _find_parent(
    space: Space, number: int, earlier: Mapping[int, Origin], mix: Origin | None, *, timed: bool
) -> Origin:
    """The nearest earlier model such that the child keeps what it learned, and what each of its ancestors did."""
    away = space.from_one(number)
    shares: dict[int, float] = {}
    lineage = set()
    for other, origin in earlier.items():  # parents come before children
        before = origin.parent
        if before is not None:
            shares[other] = kept_share(space, number, other, before)
        if before is None or (before in lineage and shares[other] >= KEPT):
            lineage.add(other)
    parent = min(lineage, key=away.__getitem__)
    nearer = [share for other, share in shares.items() if away[other] < away[parent]]
    kept, passed = shares.get(parent), max(nearer, default=None)
    return Origin(
        parent, relative=_relative(space, away, parent), kept=kept, passed_over=passed, gain=mix.gain if mix else 0.0,
        probability=probability(kept, passed, timed=timed),
    )  # fmt: skip


def _describe_merge(space: Space, number: int, merge: Origin) -> Origin:
    parent = next(iter(merge.members))
    relative = _relative(space, space.from_one(number), parent)
    return Origin(parent, merge.members, MERGE_PROBABILITY, relative, gain=merge.gain)


def _relative(space: Space, away: Vector, parent: int) -> float:
    return sqrt(float(away[parent]) / max(float(space.energy[parent]), 1e-300))


MERGE_PROBABILITY = 0.99
CALIBRATION = {True: (-5.42, 6.31, 1.17), False: (-2.60, 3.73, 0.19)}
"""Logistic regression, with times and without: a constant, and the slopes of `evidence`."""


def evidence(kept: float | None, passed_over: float | None) -> tuple[float, float]:
    """How far shares are from `KEPT`: the parent's above it, nearer models' below it; from −1 to 1 each."""
    above = 1.0 if kept is None else (kept - KEPT) / (1 - KEPT)
    below = 1.0 if passed_over is None else 2 * (KEPT - passed_over)
    return max(-1.0, min(above, 1.0)), max(-1.0, min(below, 1.0))


def probability(kept: float | None, passed_over: float | None, *, timed: bool) -> float:
    """That a parent is right, by logistic regression on grown trees (`bench/trust.py heritage`)."""
    constant, *slopes = CALIBRATION[timed]
    score = constant + sum(slope * x for slope, x in zip(slopes, evidence(kept, passed_over), strict=True))
    return 1 / (1 + exp(-score))


def _ancestors(origins: Sequence[Origin], number: int) -> set[int]:
    found: set[int] = set()
    waiting = [number]
    while waiting:
        origin = origins[waiting.pop()]
        above = {*origin.members} | ({origin.parent} if origin.parent is not None else set())
        waiting += above - found
        found |= above
    return found
