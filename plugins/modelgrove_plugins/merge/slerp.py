"""SLERP: from one model to another along the great circle instead of the chord, module by module.

t = w₂ / (w₁ + w₂): the weights say where on the way the result is, not how strong. Two unrelated updates are nearly at
right angles, so half-way their mean is short by 1/√2; on the circle two of equal length keep it all the way.
Adapters are merged by their updates, checkpoints by their differences from the base, or by their weights without one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from modelgrove_hub.contracts import API, Context, Kind, Params, Result
from modelgrove_hub.errors import UsageError
from modelgrove_plugins.merge.merging import merge
from modelgrove_plugins.merge.methods import Method, Parts
from modelgrove_plugins.merge.params import MergeParams

if TYPE_CHECKING:
    from torch import Tensor


class Slerp:
    """Interpolate between two models on a sphere."""

    name: ClassVar[str] = "slerp"
    kind: ClassVar[Kind] = Kind.MERGER
    api: ClassVar[int] = API
    summary: ClassVar[str] = "Goes from one model to another on a great circle, which keeps the strength of changes."
    paper: ClassVar[str] = "Shoemake, Animating Rotation with Quaternion Curves (SIGGRAPH 1985)"
    Params: ClassVar[type[Params]] = MergeParams

    def run(self, context: Context, params: MergeParams) -> Result:
        """Write the merged model; the report is that of `sum`.

        Raises:
            UsageError: not two models, they do not belong together, or a weight is negative.
            DataError: a file is broken; the message names the tensor.
        """
        models = len(context.inputs) - params.base
        if models != 2:
            raise UsageError(f"slerp goes from one model to another, so it needs two, not {models}")
        return merge(context, Method(self.name, _rule, whole=True), params)


def _rule(parts: Parts) -> Tensor:
    from modelgrove_kernels.task_vectors import slerp

    if min(parts.weights) < 0:
        raise UsageError(f"slerp goes between two models, so no weight may be negative, as in {parts.module} one is")
    total = sum(parts.weights)
    if not total:  # both are switched off here
        return parts.total()
    start, end = parts.updates
    return slerp(start, end, parts.weights[1] / total)
