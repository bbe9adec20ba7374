"""What layers are given while a network runs: the Gram matrix of each layer's inputs, their extremes, and some of them.

Columns are in packed order: of a linear layer its inputs, of a convolution kernel position by kernel position, the
input channel innermost.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from modelgrove_kernels.calls import told

LARGEST = 12_288
"""Columns of the largest Gram matrix that should be kept: 600 MB in float32."""
SAMPLED = 1024
"""Inputs of a layer that are kept as they were, drawn evenly from all."""
_ROWS = 4096


@dataclass
class LayerInputs:
    """Inputs x of a layer, seen so far, float32: over `count` of them, and a sample.

    `gram` (K, K) = Σ x xᵀ, `absmax` (K,); `sample` (n, K) of at most `SAMPLED` inputs, each as likely as any other,
    with the timestep of each in `times` (n,).
    """

    gram: Tensor
    absmax: Tensor
    count: int = 0
    sample: Tensor = field(init=False)
    times: Tensor = field(init=False)
    _keys: Tensor = field(init=False, repr=False)
    """One random number for each sampled input: the smallest of all that were drawn."""
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.sample, self.times, self._keys = torch.zeros(0, len(self.absmax)), torch.zeros(0), torch.zeros(0)
        self._generator = torch.Generator().manual_seed(0)

    @classmethod
    def none(cls, columns: int) -> LayerInputs:
        """Nothing seen yet, of a layer with that many columns."""
        return cls(torch.zeros(columns, columns), torch.zeros(columns))

    def add(self, rows: Tensor, time: float = 0.0) -> None:
        """Take (n, K) more, of one timestep."""
        for part in torch.split(rows.float(), _ROWS):
            self.gram.addmm_(part.T, part)
            torch.maximum(self.absmax, part.abs().amax(0), out=self.absmax)
            self.count += len(part)
            self._draw(part, time)

    def _draw(self, rows: Tensor, time: float) -> None:
        keys = torch.rand(len(rows), generator=self._generator)
        if len(self._keys) == SAMPLED:
            small = keys < self._keys.max()
            keys, rows = keys[small], rows[small]
        keys = torch.cat([self._keys, keys])
        chosen = keys.argsort()[:SAMPLED]
        self._keys = keys[chosen]
        self.sample = torch.cat([self.sample, rows])[chosen]
        self.times = torch.cat([self.times, torch.full((len(rows),), time)])[chosen]


def columns_of(layer: nn.Module) -> int | None:
    """K of a layer whose inputs can be captured; None for others: grouped convolutions, borders that are no zeros."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    plain = isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros"
    if plain and isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, str):
        return layer.weight[0].numel()
    return None


def rows_of(layer: nn.Module, inputs: Tensor) -> Tensor:
    """What a layer multiplies its matrix with, (n, K)."""
    if not isinstance(layer, nn.Conv2d):
        return inputs.flatten(0, -2)
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    window = {name: getattr(layer, name) for name in ("kernel_size", "dilation", "padding", "stride")}
    cut = functional.unfold(inputs, **window)
    return cut.view(len(inputs), -1, taps, cut.shape[-1]).permute(0, 3, 2, 1).reshape(-1, layer.weight[0].numel())


@contextmanager
def captured(network: nn.Module, layers: Collection[str]) -> Iterator[dict[str, LayerInputs]]:
    """The inputs of those `layers` (module paths) that can be captured, while the context lasts."""
    found: dict[str, LayerInputs] = {}
    now = 0.0

    def tell(time: float) -> None:
        nonlocal now
        now = time

    with ExitStack() as hooks:
        hooks.enter_context(told(network, tell))
        for path in layers:
            layer = network.get_submodule(path)
            width = columns_of(layer)
            if width is None:
                continue
            found[path] = LayerInputs.none(width)

            def take(module: nn.Module, inputs: tuple[Any, ...], seen: LayerInputs = found[path]) -> None:
                given = inputs[0].detach()
                # A cut-up picture is as large as its kernel has taps: one at a time.
                for part in given.split(1) if isinstance(module, nn.Conv2d) else (given,):
                    seen.add(rows_of(module, part), now)

            hooks.callback(layer.register_forward_pre_hook(take).remove)
        yield found


def output_error(difference: Tensor, weight: Tensor, gram: Tensor) -> float:
    """‖ΔW X‖² / ‖W X‖² from the Gram matrix of X; ΔW and W are (rows, K)."""
    noise, signal = (float(((matrix @ gram) * matrix).sum(dtype=torch.float64)) for matrix in (difference, weight))
    return max(noise, 0.0) / signal if signal > 0 else 0.0
