"""What common tools call a linear merge: factors are added instead of products, (Σ √wᵢ·Bᵢ)(Σ √wᵢ·Aᵢ).

Only to make an old result again: the cross terms √(wᵢwⱼ)·BᵢAⱼ mean nothing. For N unrelated adapters the result is off
by √(N-1) of the sum's norm; `distance_from_sum` in the report is what it is here. PEFT's `add_weighted_adapter` with
"linear" does so, where all adapters have the same alpha / rank.
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


class LegacyLinear:
    """Add factors separately, as PEFT's "linear" does."""

    name: ClassVar[str] = "legacy-linear"
    kind: ClassVar[Kind] = Kind.MERGER
    api: ClassVar[int] = API
    summary: ClassVar[str] = "Factors added separately, as other tools do: wrong, for compatibility alone."
    paper: ClassVar[str] = ""
    Params: ClassVar[type[Params]] = MergeParams

    def run(self, context: Context, params: MergeParams) -> Result:
        """Write the merged adapter; `distance_from_sum` in the report says how wrong it is.

        Raises:
            UsageError: an adapter has no factors, or ranks differ, or the weights do not fit.
            DataError: a file is broken; the message names the tensor.
        """
        return merge(context, Method(self.name, _added), params)


def _added(parts: Parts) -> Tensor:
    if parts.factors is None:
        raise UsageError(f"module {parts.module}: factors are added, and one of the updates is a whole matrix")
    if len({update.rank for update in parts.factors}) > 1:
        ranks = ", ".join(str(update.rank) for update in parts.factors)
        raise UsageError(f"module {parts.module}: factors of different ranks ({ranks}) cannot be added; use `sum`")
    pairs = list(zip(parts.weights, parts.factors, strict=True))
    ups = [(1.0 if weight >= 0 else -1.0) * abs(weight) ** 0.5 * update.up for weight, update in pairs]
    downs = [abs(weight) ** 0.5 * update.down for weight, update in pairs]
    found: Tensor = sum(ups[1:], start=ups[0]) @ sum(downs[1:], start=downs[0])
    return found
