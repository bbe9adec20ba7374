"""Make LoRAs orthogonal to each other after training, then sum them exactly.

Orthogonal Adaptation trains adapters in disjoint input directions (`modelgrove basis`); adapters that were trained
without it are changed here, module by module:

- `projection`: every adapter stops reading the directions that any other one reads; what they share is lost to all;
- `sequential`: it stops reading what an earlier one reads: the order of the models is their priority;
- `output`: as `projection`, of the directions that adapters write;
- `soft`: of every input direction each keeps the share that it has of the energy which all put there.

None is free and none makes concepts compose by itself: the report says what every adapter lost. After a projection of
two adapters neither answers to the inputs that the other was made for any more: it is the crosstalk that vanishes, not
the overlap of their subspaces. `tsv` replaces all directions by the nearest orthonormal ones instead (Löwdin).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from modelgrove_hub.contracts import API, Context, Kind, Params, Result
from modelgrove_plugins.merge.merging import merge
from modelgrove_plugins.merge.methods import Method, Parts
from modelgrove_plugins.merge.params import MergeParams

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_kernels.lowrank import Canonical, LowRank

Repair = Literal["projection", "sequential", "output", "soft"]


class OrthogonalParams(MergeParams):
    """The choices of all mergers, and how adapters are separated."""

    repair: Repair = Field(
        "projection",
        description="projection: drop input directions that others use; sequential: that earlier ones use; "
        "output: drop output directions; soft: share input directions by energy.",
    )


class Orthogonal:
    """Separate the adapters' directions, then add them with weights."""

    name: ClassVar[str] = "orthogonal"
    kind: ClassVar[Kind] = Kind.MERGER
    api: ClassVar[int] = API
    summary: ClassVar[str] = "LoRAs made orthogonal to each other, then summed; says what each one lost by it."
    paper: ClassVar[str] = "after Po et al., Orthogonal Adaptation (CVPR 2024)"
    Params: ClassVar[type[Params]] = OrthogonalParams

    def run(self, context: Context, params: OrthogonalParams) -> Result:
        """Write the merged adapter, or the base with it; report the overlaps before and after, and the energy lost.

        Raises:
            UsageError: the adapters do not belong together, or the weights do not fit.
            DataError: a file is broken; the message names the tensor.
        """
        from modelgrove_kernels.subspace import directions

        repair = _repair(params.repair)

        def rule(parts: Parts) -> list[Tensor]:
            forms = parts.forms if parts.factors is not None else [directions(update) for update in parts.updates]
            return [update.up @ update.down for update in repair(forms)]

        return merge(context, Method(self.name, rule, spectral=True), params)


def _repair(name: Repair) -> Callable[[Sequence[Canonical]], list[LowRank]]:
    from modelgrove_kernels.subspace import project_apart, project_in_turn, share_inputs

    def outputs_apart(updates: Sequence[Canonical]) -> list[LowRank]:
        return [update.T for update in project_apart([update.T for update in updates])]

    repairs = {
        "projection": project_apart,
        "sequential": project_in_turn,
        "output": outputs_apart,
        "soft": share_inputs,
    }
    return repairs[name]
