"""What a merging method is: a rule that makes one update of several, module by module."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from modelgrove_kernels.lowrank import Canonical, LowRank

_DIRECTIONS = 64
"""Of an update that is a whole matrix, so many are compared with others'."""

Space = Literal["core", "outputs", "full"]
"""The coordinates that updates are given in: joint bases of both sides, of the outputs alone, or the module's own.

Updates of which one is a whole matrix are always in the module's own.
"""


@dataclass
class Parts:
    """What is to become one update of a module. All matrices are float32 and in the same coordinates."""

    module: str
    updates: tuple[Tensor, ...]
    """Xᵢ, (a, b) each, at a weight of one."""
    weights: tuple[float, ...]
    places: tuple[int, ...]
    """Which of the merger's inputs they are of, counted from 0."""
    factors: tuple[LowRank, ...] | None = None
    """The same, factored as stored; None if one is a whole matrix."""
    roundings: tuple[float, ...] = ()
    """For each update the eps of the dtype that it was stored in; none if nothing was rounded."""
    seed: int = 0

    def total(self, updates: Sequence[Tensor] | None = None) -> Tensor:
        """Σ wᵢ·Xᵢ, of other updates than the given ones if they are passed."""
        first, *others = zip(self.weights, self.updates if updates is None else updates, strict=True)
        total = first[0] * first[1]
        for weight, update in others:
            total.add_(update, alpha=weight)
        return total

    def generator(self) -> Generator:
        """Random numbers of this job and module: the order in which modules are merged does not matter."""
        import torch

        digest = hashlib.sha256(f"{self.seed}:{self.module}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    @cached_property
    def forms(self) -> tuple[Canonical, ...]:
        """The singular directions of each update that the stored dtype could tell from its own rounding."""
        from modelgrove_kernels.lowrank import canonicals, leading

        found = [leading(X, _DIRECTIONS) for X in self.updates] if self.factors is None else canonicals(self.factors)
        roundings = self.roundings or (0.0,) * len(self.updates)
        return tuple(form.above(eps * form.norm) for form, eps in zip(found, roundings, strict=True))


Rule = Callable[[Parts], "Tensor | Sequence[Tensor]"]
"""The merged update; or each update as the method changed it, which are then summed with their weights."""


@dataclass(frozen=True)
class Method:
    """A rule, and what it has to be given."""

    name: str
    rule: Rule | None = None
    """None: the weighted sum."""
    space: Space = "core"
    spectral: bool = False
    """Defined by singular directions. Vectors (biases, norms), which have none, are summed."""
    whole: bool = False
    """Can merge checkpoints without their base: it makes sense of weights, not only of differences."""
