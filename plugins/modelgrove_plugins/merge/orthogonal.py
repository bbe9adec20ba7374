"""Make LoRAs orthogonal to each other after training, then sum them exactly.

Orthogonal Adaptation trains adapters in disjoint input directions; here adapters that were trained
without it are changed afterwards, module by module. `projection`: every adapter stops reading the
directions that any other one reads; what they share is lost to all. `loewdin`: all directions are
replaced by the nearest orthonormal set, as in TSV-M; energy stays, directions move. Neither is free
and neither makes concepts compose by itself: the report says what every adapter lost. After a
projection of two adapters their subspaces are as far apart as before, but neither answers to the
inputs that the other was made for any more: it is the crosstalk that vanishes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from modelgrove_hub.contracts import API, Context, Kind, Params, Result
from modelgrove_hub.errors import UsageError
from modelgrove_plugins.merge.merging import merge
from modelgrove_plugins.merge.methods import Method, Parts
from modelgrove_plugins.merge.params import MergeParams

if TYPE_CHECKING:
    from torch import Tensor


class OrthogonalParams(MergeParams):
    """The choices of all mergers, and how adapters are separated."""

    repair: Literal["projection", "loewdin"] = Field(
        "projection", description="projection: drop input directions that others use; loewdin: nearest orthonormal set."
    )


class Orthogonal:
    """Separate the adapters' directions, then add them with weights."""

    name: ClassVar[str] = "orthogonal"
    kind: ClassVar[Kind] = Kind.MERGER
    api: ClassVar[int] = API
    summary: ClassVar[str] = "LoRAs made orthogonal to each other, then summed; says what each one lost by it."
    paper: ClassVar[str] = "after Po et al., Orthogonal Adaptation (CVPR 2024); Gargiulo et al., TSV-M (CVPR 2025)"
    Params: ClassVar[type[Params]] = OrthogonalParams

    def run(self, context: Context, params: OrthogonalParams) -> Result:
        """Write one LoRA in diffusers' convention; report the overlaps before and after, and the energy lost.

        Raises:
            UsageError: fewer than two adapters, or they do not belong together, or the weights do not fit.
            DataError: a file is broken; the message names the tensor.
        """
        from modelgrove_kernels.subspace import orthogonalise, project_apart

        repair = project_apart if params.repair == "projection" else orthogonalise

        def rule(parts: Parts) -> list[Tensor]:
            return [update.up @ update.down for update in repair(parts.forms)]

        if len(context.inputs) - params.base < 2:
            raise UsageError("orthogonal merging needs two adapters or more; use `sum` to rescale or shrink one")
        return merge(context, Method(self.name, rule, spectral=True), params)
