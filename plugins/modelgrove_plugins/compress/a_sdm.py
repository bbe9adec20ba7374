"""A-SDM (arXiv 2312.15516): blocks that a denoiser hardly uses are redundant; without them, it learns to do as before.

Every block is measured by what the output loses without it, and those go that cost least, as long as the whole stays
within a tolerance. Of the paper this is the redundancy analysis, the removal and a distillation; its gathered
convolutions and attentions, which change how the remaining layers compute, are not here. (A later version was withdrawn
from arXiv by an author: what holds is what the report measures.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from modelgrove_hub.contracts import API, Context, Kind, Params, Result
from modelgrove_plugins.compress.dropping import DroppingParams, drop

if TYPE_CHECKING:
    from modelgrove_plugins.compress.dropping import Dropped


class ASdmParams(DroppingParams):
    """What counts as redundant."""

    tolerance: float = Field(
        0.02, gt=0, lt=1, description="The most that the denoiser's output may lose of its energy by the removal."
    )


class ASdm:
    """Remove the blocks that a denoiser hardly uses, and distil the rest."""

    name: ClassVar[str] = "a-sdm"
    kind: ClassVar[Kind] = Kind.COMPRESSOR
    api: ClassVar[int] = API
    summary: ClassVar[str] = "A-SDM: find and drop redundant blocks within a tolerance, then distil."
    paper: ClassVar[str] = "Zhu et al., A-SDM (arXiv 2312.15516)"
    Params: ClassVar[type[Params]] = ASdmParams

    def run(self, context: Context, params: ASdmParams) -> Result:
        """Remove blocks while the error stays within the tolerance; the report has what each is worth.

        Raises:
            UsageError: the model cannot paint, or no block of its denoiser is redundant.
        """

        def choose(dropped: Dropped, tell: Callable[[str], None]) -> None:
            while True:
                tell(f"measuring blocks, {len(dropped.removed)} removed")
                offers = dropped.offers(lambda _unit: True)
                if not dropped.removed:
                    dropped.sensitivities.update({unit.name: error for unit, error in offers})
                fitting = [offer for offer in offers if offer[1] <= params.tolerance]
                if not fitting:
                    break
                dropped.remove(*fitting[0])

        return drop(context, self.name, params, choose, frozen=0.0, guided=False)
