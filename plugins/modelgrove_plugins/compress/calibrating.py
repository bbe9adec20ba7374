"""Calibration without data: the model paints, and the inputs of its layers are measured on the way.

Prompts are words that search knows, drawn by the job's seed; every step of the sampler counts, with guidance and
without, so the timesteps and inputs are those of real use.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pydantic import Field

from modelgrove_hub.contracts import Context, InputModel
from modelgrove_plugins.compress.targets import CompressorParams

if TYPE_CHECKING:
    from torch import nn

    from modelgrove_kernels.calibration import LayerInputs

MOST = 2 << 30
"""Bytes of Gram matrices and sampled inputs that are kept at once."""


class CalibratedParams(CompressorParams):
    """How much the model paints to be calibrated."""

    pictures: int = Field(32, ge=1, le=1024, description="Pictures painted to measure the layers' inputs.")
    steps: int = Field(8, ge=1, le=200, description="Denoising steps of each.")


class Rehearsal:
    """A model that paints so that its denoiser can be watched.

    Raises:
        UsageError: the model cannot paint, or has no denoiser.
    """

    def __init__(self, context: Context, model: InputModel, params: CalibratedParams) -> None:
        from modelgrove_plugins.preview.diffusers import open_painter
        from modelgrove_plugins.preview.painter import denoiser_of

        self._context, self._params = context, params
        with TemporaryDirectory(dir=context.temp) as folder:  # all is read when it is open
            self._painter = open_painter(model, Path(folder))
        self.component = denoiser_of(self._painter, model.name)
        self._prompts = _prompts(context, params.pictures)

    @property
    def network(self) -> nn.Module:
        """The denoiser, float32."""
        return self._painter.networks[self.component]

    def paint(self) -> None:
        """All pictures, the same each time."""
        from modelgrove_plugins.preview.diffusers import PreviewParams

        wishes = [(prompt, seed) for seed, prompt in enumerate(self._prompts)]
        said = f"calibrating on {len(wishes)} pictures"
        wish = PreviewParams(prompts=("calibration",), steps=self._params.steps)
        self._painter.paint(wishes, wish, lambda done: self._context.progress(0.0, f"{said}: {done:.0%}"))


class Calibration:
    """The inputs of the layers that are to be compressed, measured when they are asked for.

    What is kept of a large network does not fit into memory together, so layers are measured in batches of at most
    `MOST` bytes, in file order, and the model paints once for each batch.

    Raises:
        UsageError: the model cannot paint, or has no denoiser.
    """

    def __init__(self, context: Context, model: InputModel, params: CalibratedParams) -> None:
        self._params, self.rehearsal = params, Rehearsal(context, model, params)
        self._waiting = self._measurable(model)
        self._seen: dict[str, LayerInputs] = {}

    def take(self, name: str) -> LayerInputs | None:
        """What the layer of the tensor called `name` was given; None if that cannot be measured. Ask once for each."""
        if name in self._waiting:
            self._measure()
        return self._seen.pop(name, None)

    def _measurable(self, model: InputModel) -> dict[str, int]:
        """Names of the tensors whose layers can be measured, in file order, with the bytes kept of each."""
        from modelgrove_kernels.calibration import LARGEST, SAMPLED, columns_of

        layers = dict(self.rehearsal.network.named_modules())
        found = {}
        for tensor in model.tensors():
            folder, _, path = tensor.name.partition("/")
            layer = layers.get(path.removesuffix(".weight")) if folder == self.rehearsal.component else None
            columns = columns_of(layer) if layer is not None and self._params.takes(tensor) else None
            if columns is not None and columns <= LARGEST:
                found[tensor.name] = 4 * columns * (columns + SAMPLED)
        return found

    def _measure(self) -> None:
        """The next batch: at least one layer."""
        from modelgrove_kernels.calibration import captured

        size, batch = 0, list[str]()
        for name, more in self._waiting.items():
            if batch and size + more > MOST:
                break
            batch.append(name)
            size += more
        paths = {name.partition("/")[2].removesuffix(".weight"): name for name in batch}
        self._waiting = {name: size for name, size in self._waiting.items() if name not in batch}
        with captured(self.rehearsal.network, list(paths)) as found:
            self.rehearsal.paint()
        self._seen = {paths[path]: inputs for path, inputs in found.items() if inputs.count}


def _prompts(context: Context, count: int) -> list[str]:
    import torch

    from modelgrove_hub.search.words import words

    known = words()
    return [f"a picture of {known[i]}" for i in torch.randperm(len(known), generator=context.generator())[:count]]
