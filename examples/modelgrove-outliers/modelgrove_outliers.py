"""Which layers have outlier weights: those are the ones that suffer when quantized."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from modelgrove_hub.contracts import API, Context, Kind, Params, Result
from modelgrove_hub.errors import DataError


class OutliersParams(Params):
    """The user's choices; they become CLI options, the REST schema and the web form."""

    sigmas: float = Field(6.0, gt=1, description="A weight is an outlier beyond this many standard deviations.")
    top: int = Field(10, ge=1, le=1000, description="How many layers to list.")


class Outliers:
    """Count weights beyond `sigmas` standard deviations in every matrix and convolution."""

    name: ClassVar[str] = "outliers"
    kind: ClassVar[Kind] = Kind.ANALYZER
    api: ClassVar[int] = API
    summary: ClassVar[str] = "Layers with the most outlier weights."
    paper: ClassVar[str] = ""
    Params: ClassVar[type[Params]] = OutliersParams

    def run(self, context: Context, params: OutliersParams) -> Result:
        """Report the layers with the largest share of outliers, and the share over all."""
        tensors = [tensor for tensor in context.inputs[0].tensors() if len(tensor.shape) >= 2]
        if not tensors:
            raise DataError(f"{context.inputs[0].name}: no matrices, nothing to look at")
        shares = {}
        for number, tensor in enumerate(tensors):
            context.progress(number / len(tensors), tensor.name)  # also where a cancel is noticed
            weight = tensor.read().float()
            beyond = (weight - weight.mean()).abs() > params.sigmas * weight.std()
            shares[tensor.name] = float(beyond.float().mean())
        worst = sorted(shares, key=lambda name: -shares[name])[: params.top]
        context.log(f"looked at {len(shares)} tensors")
        return Result(report={"worst": {name: shares[name] for name in worst}, "layers": len(shares)})
