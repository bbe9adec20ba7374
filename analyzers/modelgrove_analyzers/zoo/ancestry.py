"""Grow trees of small classifiers of which every parent is known: fine-tunes in chains and fans, merges, copies.

Each tree has a base of its own, which learns drawn letters from its own random numbers. Rounds follow: in each, every
tree gains one model, trained on some of the digits from a model that was there before. All trees are trained in one
batch, so hundreds of models take a minute. Merges, merged LoRAs and copies are made from those at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import torch
from torch import Tensor

from modelgrove_analyzers.zoo.classifiers import HIDDEN, LAYERS, Schedule, Weights, fresh_layer, train_classifiers
from modelgrove_analyzers.zoo.letters import LETTERS, SIDE, draw_letters, scanned_digits
from modelgrove_analyzers.zoo.recipes import seed_of
from modelgrove_kernels.packing import dequantize, quantize

_BATCH = 32
_CLASSES = 5
_INNER = LAYERS[:2]


@dataclass(frozen=True)
class Grown:
    """One model of a tree, and what is true of it."""

    name: str
    tree: int
    order: int
    """Models of a tree in the order in which they were made."""
    made_by: str
    parents: tuple[str, ...]
    """Names; more than one for a merge, none for a base."""
    weights: dict[str, Tensor]
    """As in a file."""
    shares: tuple[float, ...] = ()
    """Of the parents in a merge."""


@dataclass(frozen=True)
class Size:
    """How large the trees are. Merges need three fine-tunes."""

    fine_tunes: int = 8
    merges: int = 2
    letters: int = 2000
    base_steps: int = 300


def grow_trees(trees: int, seed: int = 0, size: Size | None = None) -> list[Grown]:
    """`trees` trees in order of making; each depends on the seed and its number alone."""
    size = size or Size()
    dice = [Random(seed_of("ancestry", seed, tree)) for tree in range(trees)]  # noqa: S311  (reproducible draws)
    grown = [[one] for one in grow_bases(range(seed * 1000, seed * 1000 + trees), size)]
    grown = [[_renumbered(one, tree) for one in family] for tree, family in enumerate(grown)]
    for number in range(size.fine_tunes):
        parents = [_drawn_parent(own, family) for own, family in zip(dice, grown, strict=True)]
        for family, parent, weights in zip(grown, parents, _fine_tune(parents, dice), strict=True):
            family.append(_made(family, "fine-tune", f"tune-{number}", [parent], weights))
    for own, family in zip(dice, grown, strict=True):
        _add_derived(own, family, size.merges)
    return [one for family in grown for one in family]


def grow_bases(seeds: Sequence[int], size: Size | None = None) -> list[Grown]:
    """Independent bases: each has its own start and its own letters."""
    size = size or Size()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    letters = draw_letters(size.letters, 0)
    shapes = ((HIDDEN, SIDE * SIDE), (HIDDEN, HIDDEN), (len(LETTERS), HIDDEN))
    weights: Weights = {}
    for name, shape in zip(LAYERS, shapes, strict=True):
        weights |= fresh_layer(name, shape, generators)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        rows = torch.stack([torch.randint(len(letters.classes), (_BATCH,), generator=g) for g in generators[:count]])
        return letters.pixels[rows], letters.classes[rows]

    train_classifiers(weights, [Schedule(2e-3, 0.01, size.base_steps)] * len(seeds), draw)
    return [Grown(f"base-{seed}", seed, 0, "base", (), one) for seed, one in zip(seeds, _unstack(weights), strict=True)]


def permuted(weights: dict[str, Tensor], seed: int, *, rescale: bool = False) -> dict[str, Tensor]:
    """The same function with hidden units in another order, and with `rescale` at other scales (½ to 2)."""
    generator = torch.Generator().manual_seed(seed)
    made = dict(weights)
    for name, after in pairwise(LAYERS):
        order = torch.randperm(HIDDEN, generator=generator)
        scale = torch.exp2(torch.rand(HIDDEN, generator=generator) * 2 - 1) if rescale else torch.ones(HIDDEN)
        made[f"{name}.weight"] = made[f"{name}.weight"][order] * scale[:, None]
        made[f"{name}.bias"] = made[f"{name}.bias"][order] * scale
        made[f"{after}.weight"] = made[f"{after}.weight"][:, order] / scale
    return made


def _renumbered(one: Grown, tree: int) -> Grown:
    return Grown(f"{tree}/base", tree, 0, one.made_by, (), one.weights)


def _drawn_parent(dice: Random, family: Sequence[Grown]) -> Grown:
    """The base, the last model, or any: fans, chains and what is between them."""
    return dice.choice((family[0], family[-1], dice.choice(family)))


def _fine_tune(parents: Sequence[Grown], dice: Sequence[Random]) -> list[dict[str, Tensor]]:
    """Each parent trained on five digits: rates, decays and steps as in `digits.Nuisance`."""
    digits = scanned_digits()
    schedules = [
        Schedule(10 ** own.uniform(-3.5, -2.7), 10 ** own.uniform(-4, -1), own.randint(40, 120)) for own in dice
    ]
    rows = [torch.isin(digits.classes, torch.tensor(own.sample(range(10), _CLASSES))).nonzero()[:, 0] for own in dice]
    generators = [torch.Generator().manual_seed(own.getrandbits(32)) for own in dice]
    order = sorted(range(len(parents)), key=lambda number: -schedules[number].steps)
    weights = {name: torch.stack([_stacked(parents[n].weights[name]) for n in order]) for name in parents[0].weights}

    def draw(count: int) -> tuple[Tensor, Tensor]:
        chosen = torch.stack(
            [rows[n][torch.randint(len(rows[n]), (_BATCH,), generator=generators[n])] for n in order[:count]]
        )
        return digits.pixels[chosen], digits.classes[chosen]

    train_classifiers(weights, [schedules[number] for number in order], draw)
    made = _unstack(weights)
    return [made[order.index(number)] for number in range(len(parents))]


def _add_derived(dice: Random, family: list[Grown], merges: int) -> None:
    """A LoRA merged in and trained further, merges of two and three, and copies of every kind."""
    trained = list(family)
    parent, teacher = dice.choice(trained), dice.choice(trained[1:])
    start = next(one for one in family if one.name == teacher.parents[0])
    update = {name: _low_rank(teacher.weights[name] - start.weights[name], 4) for name in _matrices()}
    fused = {name: tensor + update.get(name, 0) for name, tensor in parent.weights.items()}
    family.append(_made(family, "LoRA", "with-lora", [parent], fused))
    for number in range(merges):
        members = dice.sample(trained[1:], 2 + number % 2)
        cuts = sorted(dice.uniform(0.2, 0.8) for _ in members[1:])
        shares = tuple(b - a for a, b in zip([0.0, *cuts], [*cuts, 1.0], strict=True))
        shares = shares if min(shares) >= 0.15 else (1 / len(members),) * len(members)
        mean = {
            name: sum(
                (share * m.weights[name] for share, m in zip(shares, members, strict=True)),
                torch.zeros_like(parent.weights[name]),
            )
            for name in parent.weights
        }
        family.append(_made(family, "merge", f"merge-{number}", members, mean, shares))
    for kind, of in (("copy", dice.choice(trained)), ("fp16", dice.choice(trained)), ("bf16", dice.choice(trained))):
        dtype = {"copy": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[kind]
        family.append(_made(family, kind, kind, [of], {name: t.to(dtype) for name, t in of.weights.items()}))
    of = dice.choice(trained)
    packed = {n: dequantize(quantize(t, 8)) if n in _matrices() else t for n, t in of.weights.items()}
    family.append(_made(family, "int8", "int8", [of], packed))
    for kind in ("permuted", "rescaled"):
        of = dice.choice(trained)
        moved = permuted(of.weights, dice.getrandbits(32), rescale=kind == "rescaled")
        family.append(_made(family, kind, kind, [of], moved))


def _low_rank(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    best: Tensor = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return best


def _made(
    family: Sequence[Grown], by: str, name: str, parents: Iterable[Grown], weights: dict[str, Tensor],
    shares: tuple[float, ...] = (),
) -> Grown:  # fmt: skip
    tree = family[0].tree
    return Grown(f"{tree}/{name}", tree, len(family), by, tuple(p.name for p in parents), weights, shares)


def _matrices() -> list[str]:
    return [f"{name}.weight" for name in _INNER]


def _stacked(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 2 else tensor[None]


def _unstack(weights: Weights) -> list[dict[str, Tensor]]:
    count = len(next(iter(weights.values())))
    return [{n: t[row].clone() if n.endswith("weight") else t[row, 0].clone() for n, t in weights.items()}
            for row in range(count)]  # fmt: skip
