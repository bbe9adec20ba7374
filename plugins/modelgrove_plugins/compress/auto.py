"""The fewest errors in a given size: each layer gets the form that its measured sensitivity deserves.

Every layer of the denoiser is rounded by GPTQ to 8, 4, 3 and 2 bits. Random probes of the network's gradients say how
much each of these, alone, moves its output (kernels/sensitivity.py), and the bytes are given where they save the most
(budget.py). All other parts of the model are rounded to 8 bits, where that is all but free.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from modelgrove_hub.contracts import API, Context, Kind, LazyTensor, Params, Result
from modelgrove_hub.planning import size_of
from modelgrove_plugins.compress.budget import Option, assign, bytes_of
from modelgrove_plugins.compress.calibrating import CalibratedParams, Calibration, Rehearsal
from modelgrove_plugins.compress.gptq import rounded
from modelgrove_plugins.compress.packed import Stored, pack, predict_rounded, unpack
from modelgrove_plugins.compress.streaming import compress

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

_FORMS: dict[str, tuple[int, int | None]] = {"int8": (8, None), "int4": (4, 64), "lut3": (3, 64), "lut2": (2, 64)}
"""Bits and group width of what a layer may become; it may also be kept."""
_KEPT = "kept"


class AutoParams(CalibratedParams):
    """How small, and how well sensitivities are measured."""

    size: str = Field("30%", description="Of all tensors: a share of the original (30%) or bytes (500MB, 1.5GiB).")
    probes: int = Field(64, ge=1, le=10_000, description="Backward passes; the error of a sensitivity falls with √n.")


class Auto:
    """Choose for each layer between 16, 8, 4, 3 and 2 bits so that the whole has a size and loses least."""

    name: ClassVar[str] = "auto"
    kind: ClassVar[Kind] = Kind.COMPRESSOR
    api: ClassVar[int] = API
    summary: ClassVar[str] = "Mixed precision under a size: bits go to the layers that move the output most."
    paper: ClassVar[str] = "Shoham & Gersho, bit allocation (1988); Frantar et al., GPTQ (arXiv 2210.17323)"
    Params: ClassVar[type[Params]] = AutoParams

    def run(self, context: Context, params: AutoParams) -> Result:
        """Paint, round, probe, choose, write. Layers report their sensitivity: what they alone add to the error.

        Raises:
            UsageError: the size cannot be reached, the model cannot paint or has nothing to quantize.
            DataError: a weight is NaN or infinite; the message names it.
        """
        model = context.inputs[0]
        tensors = list(model.tensors())
        most = bytes_of(params.size, sum(map(size_of, tensors)))
        calibration = Calibration(context, model, params)
        forms = _forms(calibration, params, tensors)
        errors = _errors(context, params, calibration.rehearsal, forms)
        options = {tensor.name: _options(tensor, forms.get(tensor.name, {}), errors, params) for tensor in tensors}
        chosen = assign(options, most)

        def quantize(tensor: LazyTensor) -> Stored | None:
            option = chosen[tensor.name]
            if option.name == _KEPT:
                return None
            made = forms[tensor.name] if tensor.name in forms else {option.name: pack(tensor.read(), 8, None)}
            found = made[option.name]
            remarks = {**found.remarks, "sensitivity": float(f"{option.error:.3e}")} if tensor.name in forms else {}
            return Stored(found.entry, found.parts, remarks)

        result = compress(context, self.name, params.recorded(), quantize, "mixed", fidelity=params.fidelity)
        expected = sum(option.error for option in chosen.values())
        return Result(result.outputs, {**result.report, "expected_error": float(f"{expected:.3e}")}, result.artefacts)


def _forms(calibration: Calibration, params: AutoParams, tensors: Sequence[LazyTensor]) -> dict[str, dict[str, Stored]]:
    """What each layer whose inputs are seen may become."""
    forms = {}
    for tensor in tensors:
        inputs = calibration.take(tensor.name) if params.takes(tensor) else None
        if inputs is not None:
            forms[tensor.name] = {name: rounded(tensor, inputs, *form) for name, form in _FORMS.items()}
    return forms


def _errors(
    context: Context, params: AutoParams, rehearsal: Rehearsal, forms: Mapping[str, Mapping[str, Stored]]
) -> dict[str, dict[str, float]]:
    """Name of a tensor → form → its share of the output's energy."""
    from modelgrove_kernels.calls import recorded
    from modelgrove_kernels.sensitivity import sensitivities

    network, folder = rehearsal.network, f"{rehearsal.component}/"
    with recorded(network) as calls:
        rehearsal.paint()
    changes = {
        name.removeprefix(folder): partial(_differences, network.get_parameter(name.removeprefix(folder)), made)
        for name, made in forms.items()
    }
    found = sensitivities(
        network, changes, calls, params.probes, context.generator(),
        lambda done: context.progress(0.8 * done, "probing the layers' sensitivities"),
    )  # fmt: skip
    return {f"{folder}{name}": dict(zip(_FORMS, values, strict=True)) for name, values in found.items()}


def _differences(weight: Tensor, made: Mapping[str, Stored]) -> list[Tensor]:
    return [unpack(stored, "").float() - weight.detach() for stored in made.values()]


def _options(
    tensor: LazyTensor, made: Mapping[str, Stored], errors: Mapping[str, Mapping[str, float]], params: AutoParams
) -> list[Option]:
    if made:
        kept = Option(_KEPT, size_of(tensor), 0.0)
        return [kept, *(Option(name, made[name].entry.bytes, errors[tensor.name][name]) for name in made)]
    if params.takes(tensor):
        return [Option("int8", predict_rounded(tensor, 8, None).bytes, 0.0)]
    return [Option(_KEPT, size_of(tensor), 0.0)]
