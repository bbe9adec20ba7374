"""Magnitude pruning: the smallest weights of each layer, or of a whole component, become zero.

"Efficient pruning of text-to-image models" (arXiv 2411.15113) finds that it loses less than cleverer criteria on
Stable Diffusion 2, prunes text encoder and denoiser by different shares (47.5 % and 35 %), and reports a threshold
beyond which pictures fail at once. `--sparsity auto` looks for that cliff and stays before it (cliff.py).
What holds on the zoo's base is in docs/compression.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from modelgrove_hub.contracts import API, Context, InputModel, Kind, LazyTensor, Params, Result
from modelgrove_hub.errors import UsageError
from modelgrove_plugins.compress.packed import Stored, matrix_of, predict
from modelgrove_plugins.compress.pruning import (
    AUTO,
    SPARSITY,
    Sparsity,
    check_components,
    component_of,
    keep,
    largest,
    share_for,
    shares_of,
    threshold,
)
from modelgrove_plugins.compress.streaming import compress
from modelgrove_plugins.compress.targets import CompressorParams

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_hub.formats.quantized import PackedTensor
    from modelgrove_plugins.compress.cliff import Sweep

CLIFF = "cliff.png"
"""Artefact: each component's error over its sparsity, with `--sparsity auto`."""


class MagnitudeParams(CompressorParams):
    """How many weights go."""

    sparsity: Sparsity = Field("0.3", description=f"{SPARSITY} auto: as far as tolerance and the cliff allow.")
    scope: Literal["layer", "global"] = Field(
        "layer", description="Where weights are compared: in each layer, or in a whole component."
    )
    tolerance: float = Field(
        0.02, gt=0, lt=1, description="With auto: the most that the component's output may lose of its energy."
    )


class Magnitude:
    """Drop the weights of least |w|."""

    name: ClassVar[str] = "magnitude"
    kind: ClassVar[Kind] = Kind.COMPRESSOR
    api: ClassVar[int] = API
    summary: ClassVar[str] = "Prune the smallest weights of each layer or component; can find how far that goes."
    paper: ClassVar[str] = "Ramesh & Zhao, Efficient Pruning of Text-to-Image Models (arXiv 2411.15113)"
    Params: ClassVar[type[Params]] = MagnitudeParams

    def choose(self, tensor: LazyTensor, params: MagnitudeParams) -> PackedTensor | None:
        """What `run` will make of a tensor without zeros.

        Raises:
            UsageError: with a global threshold or `auto` the values decide.
        """
        if params.sparsity == AUTO or params.scope == "global":
            raise UsageError(
                "magnitude has no plan for sparsity auto or scope global: the values of the weights decide"
            )
        share = share_for(shares_of(params.sparsity), tensor.name)
        if not share or not params.takes(tensor):
            return None
        nonzero = prod(tensor.shape) - int(share * prod(tensor.shape))
        return predict(tensor, layout="sparse", bits=1, group=prod(tensor.shape[1:]), nonzero=nonzero)

    def run(self, context: Context, params: MagnitudeParams) -> Result:
        """Write the pruned model; a weight takes a bit, and its value if it stays.

        Raises:
            UsageError: a component is not there; with `auto` the model cannot paint, or bears no pruning at all; there
                is nothing to prune, or the model is an adapter or packed already.
            DataError: a weight is NaN or infinite; the message names it.
        """
        model, found = context.inputs[0], dict[str, "Sweep"]()
        if params.sparsity == AUTO:
            found, shares = _search(context, params)
        else:
            shares = shares_of(params.sparsity)
            check_components(shares, model)
        thresholds = _thresholds(model, params, shares) if params.scope == "global" else {}

        def prune(tensor: LazyTensor) -> Stored | None:
            share = share_for(shares, tensor.name)
            if not share or not params.takes(tensor):
                return None
            values = tensor.read()
            return keep(values, _kept(matrix_of(values), share, thresholds.get(component_of(tensor.name))))

        recorded = {**params.recorded(), "sparsity": ",".join(_named(name, share) for name, share in shares.items())}
        result = compress(context, self.name, recorded, prune, _tag(shares), fidelity=params.fidelity)
        return _with_curves(context, result, found) if found else result


def _kept(matrix: Tensor, share: float, least: float | None) -> Tensor:
    sizes = matrix.abs().float()
    return largest(sizes.view(1, -1), share).view(matrix.shape) if least is None else sizes >= least


def _thresholds(model: InputModel, params: MagnitudeParams, shares: Mapping[str, float]) -> dict[str, float]:
    """The |w| below which weights go, by component."""
    taken: dict[str, list[LazyTensor]] = {}
    for tensor in model.tensors():
        if params.takes(tensor) and share_for(shares, tensor.name):
            taken.setdefault(component_of(tensor.name), []).append(tensor)
    return {
        name: threshold(lambda tensors=tensors: (one.read() for one in tensors), share_for(shares, tensors[0].name))  # type: ignore[misc]
        for name, tensors in taken.items()
    }


def _search(context: Context, params: MagnitudeParams) -> tuple[dict[str, Sweep], dict[str, float]]:
    """The curves, and the share of each component that bears some pruning."""
    from modelgrove_plugins.compress.cliff import GRID, sweep

    def prune(weights: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        least = threshold(weights.values, share) if params.scope == "global" else None
        return {
            name: weight * _kept(weight.flatten(1), share, least).view_as(weight) for name, weight in weights.items()
        }

    found = sweep(context, params.takes_shape, prune, params.tolerance)
    shares = {name: one.chosen for name, one in found.items() if one.chosen is not None}
    if not shares:
        least = {name: f"{one.curve[0][1]:.2g}" for name, one in found.items()}
        raise UsageError(
            f"sparsity auto: at {GRID[0]:.0%} already more than the tolerance {params.tolerance:g} is lost"
            f" ({', '.join(f'{name}: {error}' for name, error in least.items()) or 'no component was heard'});"
            " give more tolerance, or a sparsity"
        )
    return found, shares


def _with_curves(context: Context, result: Result, found: Mapping[str, Sweep]) -> Result:
    from modelgrove_plugins.compress.picture import plot_sweeps

    curves = {name: one.curve for name, one in found.items()}
    chosen = {name: one.chosen for name, one in found.items() if one.chosen is not None}
    plot_sweeps(curves, chosen).save(context.path(CLIFF), "PNG")
    report = {**result.report, "sweeps": {name: one.report() for name, one in found.items()}}
    return replace(result, report=report, artefacts=(*result.artefacts, CLIFF))


def _named(name: str, share: float) -> str:
    return f"{name}={share:g}" if name else f"{share:g}"


def _tag(shares: Mapping[str, float]) -> str:
    """ "sparse35"; of several shares the largest."""
    return f"sparse{round(100 * max(shares.values()))}"
