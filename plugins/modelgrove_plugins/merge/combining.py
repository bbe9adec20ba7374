"""The middle of every merge: the updates of one module, brought into common coordinates, become one by the rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from modelgrove_plugins.merge.methods import Method, Parts

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_kernels.core_space import Frame
    from modelgrove_kernels.lowrank import LowRank
    from modelgrove_kernels.sparse import Support


@dataclass(frozen=True)
class Combined:
    """One module after the rule."""

    parts: Parts
    frame: Frame
    changed: tuple[Tensor, ...] | None
    """Every update as the method left it, in the frame; None if it made one of all."""
    result: Tensor
    """The merged update in the frame, float32."""

    @property
    def vector(self) -> bool:
        """Whether it changes a bias or a norm's weight, (1, n), which has no directions."""
        return self.parts.factors is None and self.result.shape[0] == 1

    def lifted(self, support: Support) -> Combined:
        """The same in all places of the module, where it was combined in some of them."""
        parts = replace(self.parts, updates=tuple(map(support.lift, self.parts.updates)))
        changed = None if self.changed is None else tuple(map(support.lift, self.changed))
        return Combined(parts, self.frame, changed, support.lift(self.result))


def combine(
    method: Method, module: str, updates: Mapping[int, LowRank | Tensor], weights: Sequence[float],
    roundings: Sequence[float] = (), seed: int = 0,
) -> Combined:  # fmt: skip
    """Merge the updates (m, n) of a module, given by the places of their inputs; `weights` in the same order.

    A module that one input alone changes has nothing to settle: its update is only weighted.

    Raises:
        ValueError: a value is not finite.
    """
    parts, frame = _parts(method, module, updates, weights, roundings, seed)
    vectors = min(next(iter(updates.values())).shape) == 1
    if method.rule is None or len(updates) == 1 or (method.spectral and vectors):
        return Combined(parts, frame, None, parts.total())
    found = method.rule(parts)
    if isinstance(found, Sequence):
        return Combined(parts, frame, tuple(found), parts.total(found))
    return Combined(parts, frame, None, found)


def _parts(
    method: Method, module: str, updates: Mapping[int, LowRank | Tensor], weights: Sequence[float],
    roundings: Sequence[float], seed: int,
) -> tuple[Parts, Frame]:  # fmt: skip
    from modelgrove_kernels.core_space import Frame, core_of
    from modelgrove_kernels.lowrank import LowRank

    factors = tuple(update for update in updates.values() if isinstance(update, LowRank))
    known = len(factors) == len(updates)
    frame = Frame()
    if known and method.space != "full":
        frame, factors = core_of(factors, inputs=method.space == "core")
    matrices = tuple(
        update.up @ update.down if isinstance(update, LowRank) else update
        for update in (factors if known else updates.values())
    )
    return Parts(
        module=module, updates=matrices, weights=tuple(weights), places=tuple(updates),
        factors=factors if known else None, roundings=tuple(roundings), seed=seed,
    ), frame  # fmt: skip
