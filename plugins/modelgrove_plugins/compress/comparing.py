"""Whether a compressed model is compared with its original, and the plots that every compressor leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from modelgrove_hub.contracts import Context, InputModel, LazyTensor
from modelgrove_hub.errors import ModelgroveError
from modelgrove_plugins.compress.targets import DENOISERS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from modelgrove_plugins.compress.fidelity import Comparison
    from modelgrove_plugins.compress.packed import Stored

PLOT, SHEET = "layers.png", "sheet.png"
"""Artefacts: what each layer lost, and pictures by the original and the packed model side by side."""
MOST = 100_000_000
"""Parameters of a denoiser up to which it is compared unasked: some minutes on one core."""


@dataclass
class Evidence:
    """The packed tensors of a denoiser that is to be compared, or why there is nothing to compare."""

    component: str = ""
    reason: str = ""
    tensors: dict[str, Stored | Tensor] = field(default_factory=dict)

    def keep(self, name: str, result: Stored | Tensor) -> None:
        """Remember what became of a tensor, if it is one of the denoiser's."""
        folder, _, rest = name.partition("/")
        if self.component and folder == self.component:
            self.tensors[rest] = result


def seek(model: InputModel, tensors: Iterable[LazyTensor], wanted: bool | None) -> Evidence:
    """Decide by the model's files; `wanted` is the parameter `fidelity`."""
    if wanted is False:
        return Evidence(reason="it was not wanted")
    files = model.files()
    component = next((name for name in DENOISERS if f"{name}/config.json" in files), "")
    if not component or "model_index.json" not in files:
        return Evidence(reason="the model is no pipeline with a denoiser")
    size = sum(prod(tensor.shape) for tensor in tensors if tensor.name.startswith(f"{component}/"))
    if wanted is None and size > MOST:
        return Evidence(reason=f"its denoiser has {size:,} parameters: ask for it with fidelity")
    return Evidence(component)


def compare(context: Context, evidence: Evidence, timesteps: Sequence[int], method: str) -> dict[str, Any]:
    """The report's `fidelity`, with the sheet written; only a `reason` where nothing could be compared."""
    if not evidence.component:
        return {"reason": evidence.reason}
    return _compared(
        context,
        evidence.component,
        lambda comparison: comparison.report(evidence.tensors, timesteps, context.path(SHEET), method),
    )


def compare_network(
    context: Context, component: str, network: nn.Module, method: str, wanted: bool | None
) -> dict[str, Any]:
    """The same of a denoiser that has another form than the original's `component`."""
    evidence = seek(context.inputs[0], context.inputs[0].tensors(), wanted)
    if not evidence.component:
        return {"reason": evidence.reason}
    return _compared(context, component, lambda comparison: comparison.judged(network, context.path(SHEET), method))


def _compared(context: Context, component: str, judge: Callable[[Comparison], dict[str, Any]]) -> dict[str, Any]:
    from modelgrove_plugins.compress.fidelity import Comparison
    from modelgrove_plugins.preview.diffusers import open_painter

    context.progress(0.9, "comparing with the original")
    try:
        comparison = Comparison(open_painter(context.inputs[0], context.temp / "original"), component)
        context.progress(0.95, "comparing with the original")
        return judge(comparison)
    except ModelgroveError as error:
        return {"reason": str(error)}


def draw(context: Context, method: str, layers: Sequence[Mapping[str, Any]], fidelity: Mapping[str, Any]) -> None:
    """Write the plot of the report's layers, with the error over timesteps where there is one."""
    from modelgrove_plugins.compress.picture import plot

    curve = [(time, error) for time, error in fidelity.get("by_timestep", ())]
    plot(layers, {method: curve} if curve else {}).save(context.path(PLOT), "PNG")
