"""What methods that look at single entries share: how many they keep, and in which coordinates they look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from modelgrove_plugins.merge.methods import Method, Parts
from modelgrove_plugins.merge.params import MergeParams

if TYPE_CHECKING:
    from torch import Tensor

EntryRule = Callable[[Parts, Sequence["Tensor"]], "Tensor | Sequence[Tensor]"]
"""As a `Rule`, with the updates in the coordinates that are looked at."""


Space = Literal["core", "full"]
SPACE = (
    "core: entries of adapters in their joint singular directions, fast; full: entries of the weights themselves, as "
    "other tools have it, with a result of full rank. Checkpoints are always merged in full."
)
"""What is said of the choice."""


class EntryParams(MergeParams):
    """The choices of all mergers, and which entries are looked at."""

    density: float = Field(0.5, gt=0, le=1, description="The share of entries that is kept of each model's update.")
    space: Space = Field("full", description=SPACE)


def by_entries(name: str, rule: EntryRule, params: EntryParams) -> Method:
    """The method that applies `rule` in the coordinates asked for.

    A core has no coordinates of its own: those of the QR that made it depend on how the adapters were factored and on
    their order. Its entries are therefore looked at along its principal directions, which do not.
    """

    def turned(parts: Parts) -> Tensor | Sequence[Tensor]:
        if params.space == "full" or parts.factors is None:
            return rule(parts, parts.updates)
        from modelgrove_kernels.task_vectors import principal_bases

        left, right = principal_bases(parts.updates)
        found = rule(parts, [left.T @ update @ right for update in parts.updates])
        if isinstance(found, Sequence):
            return [left @ update @ right.T for update in found]
        return left @ found @ right.T

    return Method(name, turned, space=params.space)
