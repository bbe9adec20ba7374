"""Calibration without data: the model paints, and the inputs of its layers are measured on the way.

Prompts are words that search knows, drawn by the job's seed; every step of the sampler counts, with guidance and
without, so the timesteps and inputs are those of real use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from modelgrove_hub.contracts import Context, InputModel
from modelgrove_hub.errors import UsageError
from modelgrove_plugins.compress.targets import CompressorParams

if TYPE_CHECKING:
    from modelgrove_kernels.calibration import LayerInputs
    from modelgrove_plugins.preview.painter import Painter

DENOISERS = ("unet", "transformer")


class CalibratedParams(CompressorParams):
    """How much the model paints to be calibrated."""

    pictures: int = Field(32, ge=1, le=1024, description="Pictures painted to measure the layers' inputs.")
    steps: int = Field(8, ge=1, le=200, description="Denoising steps of each.")


def calibrate(context: Context, model: InputModel, params: CalibratedParams) -> dict[str, LayerInputs]:
    """The inputs of the layers whose weights are to be quantized; tensor name → what was seen.

    Raises:
        UsageError: the model cannot paint, or has no denoiser.
    """
    from modelgrove_kernels.calibration import captured
    from modelgrove_plugins.preview.diffusers import open_painter

    painter = open_painter(model, context.temp / "calibration")
    component = next((name for name in DENOISERS if name in painter.networks), None)
    if component is None:
        raise UsageError(f"{model.name} has no {' or '.join(DENOISERS)} to calibrate; --method rtn needs none")
    wanted = {tensor.name for tensor in model.tensors() if params.takes(tensor)}
    network = painter.networks[component]
    layers = [path for path, _ in network.named_modules() if f"{component}/{path}.weight" in wanted]
    with captured(network, layers) as found:
        _paint(context, painter, params)
    return {f"{component}/{path}.weight": inputs for path, inputs in found.items() if inputs.count}


def _paint(context: Context, painter: Painter, params: CalibratedParams) -> None:
    import torch

    from modelgrove_hub.search.words import words
    from modelgrove_plugins.preview.diffusers import PreviewParams

    known = words()
    chosen = torch.randperm(len(known), generator=context.generator())[: params.pictures].tolist()
    prompts = [f"a picture of {known[place]}" for place in chosen]
    wishes = [(prompt, seed) for seed, prompt in enumerate(prompts)]
    wish = PreviewParams(prompts=("calibration",), steps=params.steps)
    painter.paint(wishes, wish, lambda done: context.progress(0.3 * done, f"calibrating on {len(wishes)} pictures"))
