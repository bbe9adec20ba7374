"""RegMean: the update that answers to each adapter's own inputs as that adapter does, as nearly as one can.

The base paints with every adapter alone, on that adapter's words, and the second moments Gᵢ of what its layers are
given are measured on the way. Then Δ = Σ wᵢΔᵢGᵢ(Σ Gⱼ)⁻¹ is the least-squares answer in closed form. It needs a base
that can paint; the more alike the inputs of two adapters are, the more it averages them. Modules that cannot be watched
are summed, and the report says how many. What was measured can be kept for the next merge with the same adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, field_validator

from modelgrove_hub.contracts import API, Context, InputModel, Kind, Params, Result
from modelgrove_hub.errors import UsageError
from modelgrove_plugins.merge.alignment import align
from modelgrove_plugins.merge.merging import merge, parted
from modelgrove_plugins.merge.methods import Method, Parts
from modelgrove_plugins.merge.params import MergeParams

if TYPE_CHECKING:
    from torch import Tensor


class RegMeanParams(MergeParams):
    """The choices of all mergers, and how inputs are measured."""

    pictures: int = Field(16, ge=1, le=1024, description="Pictures painted with each adapter to measure inputs.")
    steps: int = Field(8, ge=1, le=200, description="Denoising steps of each.")
    shrink: float = Field(0.9, ge=0, le=1, description="What is kept of the moments of two different inputs.")
    inputs: tuple[Path, ...] = Field(
        (), description="Files that earlier merges kept: adapters in them are not watched."
    )
    keep_inputs: bool = Field(False, description="Keep what was measured in a file, for further merges.")

    unrecorded: ClassVar[frozenset[str]] = MergeParams.unrecorded | {"inputs", "keep_inputs"}

    @field_validator("inputs")
    @classmethod
    def _absolute(cls, inputs: tuple[Path, ...]) -> tuple[Path, ...]:
        return tuple(path.expanduser().absolute() for path in inputs)  # a worker has another working directory


class RegMean:
    """Merge by least squares on every adapter's inputs."""

    name: ClassVar[str] = "regmean"
    kind: ClassVar[Kind] = Kind.MERGER
    api: ClassVar[int] = API
    summary: ClassVar[str] = "Adapters merged so that each keeps its answers to its own inputs; the base must paint."
    paper: ClassVar[str] = "Jin et al., Dataless Knowledge Fusion by Merging Weights (ICLR 2023)"
    Params: ClassVar[type[Params]] = RegMeanParams

    def run(self, context: Context, params: RegMeanParams) -> Result:
        """Write the merged adapter, or the base with it; the report says how many modules were merged by their inputs.

        Raises:
            UsageError: a model is no adapter, no base is known or it cannot paint, or models do not belong together.
            DataError: a file is broken; the message names the tensor.
        """
        from modelgrove_plugins.merge.kept_moments import FILE, KeptMoments
        from modelgrove_plugins.merge.moments import Moments
        from modelgrove_plugins.merge.wording import prompts_of

        adapters, base = _inputs(context, params)
        alignment = align(adapters, base)
        shared = [site for site in alignment.sites if len(site.targets) > 1 and min(site.shape) > 1]
        measuring = {"pictures": params.pictures, "steps": params.steps}
        kept = KeptMoments(context, params.inputs, base, adapters, measuring, keep=params.keep_inputs)
        moments = Moments(context, base, adapters, shared, **measuring, kept=kept)
        if shared and not moments.measurable:
            raise UsageError(f"no layer of {base.name} that the adapters share can be watched; use another method")
        measured = 0

        def rule(parts: Parts) -> Tensor | Sequence[Tensor]:
            nonlocal measured
            found = moments.take(parts.module, parts.places)
            if found is None:
                return parts.updates
            measured += 1
            return _regressed(parts, found, params.shrink)

        result = merge(context, Method(self.name, rule, space="outputs", spectral=True), params)
        if measured < len(shared):
            context.log(f"{len(shared) - measured} of {len(shared)} shared modules have no moments and were summed")
        prompts = {model.name: list(prompts_of(model)) for model in adapters}
        facts = {"base": base.name, "prompts": prompts, "measured_modules": measured, "shared_modules": len(shared)}
        artefacts = (*result.artefacts, *([FILE] if params.keep_inputs else ()))
        return replace(result, report={**result.report, "inputs": facts}, artefacts=artefacts)


def _inputs(context: Context, params: RegMeanParams) -> tuple[Sequence[InputModel], InputModel]:
    adapters, base = parted(context.inputs, based=params.base)
    if whole := [model.name for model in adapters if model.adapter_type is None]:
        raise UsageError(f"{whole[0]} is no adapter: regmean merges adapters, by what their base does with them")
    known = base or next((model.base for model in adapters if model.base), None)
    if known is None:
        raise UsageError("regmean watches the base paint: register the adapters' base, or give it with --base")
    return adapters, known


def _regressed(parts: Parts, moments: Sequence[Tensor], shrink: float) -> list[Tensor]:
    from modelgrove_kernels.regmean import regress

    if parts.factors is None:
        return regress(parts.updates, moments, shrink)
    downs = regress([update.down for update in parts.factors], moments, shrink)
    return [update.up @ down for update, down in zip(parts.factors, downs, strict=True)]
