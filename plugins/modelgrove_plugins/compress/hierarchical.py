"""HierarchicalPrune (AAAI 2026): later blocks go first, early ones stay, and what is left learns from the original.

Hierarchical position pruning removes what is worth least among the later blocks, for early ones build the picture's
structure and late ones its texture; positional weight preservation leaves early blocks alone in the learning too;
sensitivity-guided distillation holds a block the less, the more sensitive it is. The paper packs the result to INT4:
`compress --method gptq` does that with the model that this one writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from modelgrove_hub.contracts import API, Context, Kind, Params, Result
from modelgrove_plugins.compress.dropping import DroppingParams, drop

if TYPE_CHECKING:
    from modelgrove_plugins.compress.dropping import Dropped


class HierarchicalParams(DroppingParams):
    """How much goes, and from where."""

    keep: float = Field(0.8, gt=0, lt=1, description="Share of the denoiser's parameters that stays.")
    protect: float = Field(
        0.5, ge=0, le=1, description="Blocks before this depth stay and do not learn: 0 is the first block, 1 the last."
    )


class Hierarchical:
    """Remove the later blocks that a denoiser misses least, down to a size, and distil the rest."""

    name: ClassVar[str] = "hierarchical"
    kind: ClassVar[Kind] = Kind.COMPRESSOR
    api: ClassVar[int] = API
    summary: ClassVar[str] = (
        "HierarchicalPrune: drop late blocks down to a size; guided distillation; any diffusers model."
    )
    paper: ClassVar[str] = "HierarchicalPrune: Position-Aware Compression for Large-Scale Diffusion Models (AAAI 2026)"
    Params: ClassVar[type[Params]] = HierarchicalParams

    def run(self, context: Context, params: HierarchicalParams) -> Result:
        """Remove blocks until `keep` is reached or nothing else may go; the report has what each is worth.

        Raises:
            UsageError: the model cannot paint, or no block of its denoiser may go.
        """

        def choose(dropped: Dropped, tell: Callable[[str], None]) -> None:
            least = params.keep * dropped.size()
            while dropped.size() > least:
                tell(f"measuring blocks, {len(dropped.removed)} removed")
                offers = dropped.offers(lambda unit: unit.position >= params.protect)
                if not offers:
                    break
                if not dropped.removed:
                    dropped.sensitivities.update({unit.name: error for unit, error in offers})
                dropped.remove(*offers[0])

        return drop(context, self.name, params, choose, params.protect, guided=True)
