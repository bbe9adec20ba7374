"""How a component's error grows with its sparsity, whether it falls off a cliff, and how far to go.

"Efficient pruning of text-to-image models" (arXiv 2411.15113) reports that Stable Diffusion 2 bears pruning up to a
threshold and then fails at once. Here the model paints a few pictures, every call of the denoiser and of the text
encoders is kept, and copies of each, pruned a little more each time, answer the same calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelgrove_hub.contracts import Context
from modelgrove_plugins.compress.targets import DENOISERS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from modelgrove_kernels.calls import Call
    from modelgrove_plugins.preview.painter import Painter

GRID = tuple(round(0.10 + 0.05 * step, 2) for step in range(16))
"""Sparsities that are tried: at 16 bits, less than 6.3 % saves nothing."""
_STEPS = 8
_BEND = 2.0
"""At a cliff the error grows by a factor whose logarithm is at least so many times that of the step before…"""
_JUMP = 2.0
"""…and by at least this factor."""

Prune = Callable[[Mapping[str, "Tensor"], float], Mapping[str, "Tensor"]]
"""A component's weights by name ("unet/conv.weight"), a sparsity → those weights with zeros."""


@dataclass(frozen=True)
class Sweep:
    """A component's curve and what follows from it."""

    curve: tuple[tuple[float, float], ...]
    """(sparsity, ‖ŷ - y‖² / ‖y‖² of the component's output), ascending."""
    cliff: float | None
    """The last sparsity before the error jumps; None if it grows smoothly."""
    chosen: float | None
    """The operating point; None if even the least sparsity costs too much."""

    def report(self) -> dict[str, Any]:
        """As JSON values."""
        curve = [[sparsity, float(f"{error:.3e}")] for sparsity, error in self.curve]
        return {"cliff": self.cliff, "chosen": self.chosen, "curve": curve}


def find_cliff(curve: Sequence[tuple[float, float]]) -> float | None:
    """The sparsity of an ascending, even grid after which log error bends upwards most; None if it grows smoothly.

    With r the factor by which the error grows from one point to the next, there is a cliff where r is at least 2 and
    at least the square of the r before. Of several, the one with the largest second difference of log error counts.
    Pruning by size alone makes log error concave (r falls), so that noise does not look like a cliff.
    """
    logs = [(sparsity, math.log(error)) for sparsity, error in curve if error > 0]
    best, found = 0.0, None
    for (_, before), (place, here), (_, after) in zip(logs, logs[1:], logs[2:], strict=False):
        rise, last = after - here, here - before
        bends = rise >= math.log(_JUMP) and rise >= _BEND * last
        if bends and rise - last > best:
            best, found = rise - last, place
    return found


def choose(curve: Sequence[tuple[float, float]], cliff: float | None, tolerance: float) -> float | None:
    """The largest sparsity up to the cliff whose error, and that of all below it, is at most `tolerance`."""
    chosen = None
    for sparsity, error in curve:
        if error > tolerance or (cliff is not None and sparsity > cliff):
            break
        chosen = sparsity
    return chosen


def sweep(
    context: Context, takes: Callable[[str, Sequence[int]], bool], prune: Prune, tolerance: float
) -> dict[str, Sweep]:
    """The curves of the denoiser and of the text encoders of the first input, by component.

    `takes` says by name and shape which weights are pruned. One small preview, then a pass over its calls for each
    point of the grid; only the weights that are pruned are held twice.

    Raises:
        UsageError: the model cannot paint.
        DataError: a part of it is missing or broken.
    """
    from modelgrove_plugins.preview.diffusers import open_painter

    context.progress(0.0, "painting, to find the cliff")
    painter = open_painter(context.inputs[0], context.temp / "cliff")
    networks = {name: network for name, network in painter.networks.items() if _asked(name)}
    with ExitStack() as hooks:
        calls = {name: hooks.enter_context(_heard(network)) for name, network in networks.items()}
        _paint(painter)
    found = {}
    for name, network in networks.items():
        weights = {key: value for key, value in network.named_parameters() if takes(f"{name}/{key}", value.shape)}
        if weights and calls[name]:
            curve = _curve(context, name, network, calls[name], weights, prune)
            cliff = find_cliff(curve)
            found[name] = Sweep(curve, cliff, choose(curve, cliff, tolerance))
    return found


def _asked(component: str) -> bool:
    return component in DENOISERS or component.startswith("text_encoder")


def _paint(painter: Painter) -> None:
    from modelgrove_plugins.compress.fidelity import PROMPTS
    from modelgrove_plugins.preview.diffusers import PreviewParams

    wishes = [(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    painter.paint(wishes, PreviewParams(prompts=PROMPTS, steps=_STEPS), lambda _done: None)


@contextmanager
def _heard(network: nn.Module) -> Iterator[list[Call]]:
    """The calls of a denoiser or text encoder, with the first of its outputs."""
    from modelgrove_kernels.calls import Call

    calls: list[Call] = []

    def keep(_network: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], answer: Any) -> None:
        calls.append(Call(0.0, positional, dict(named), answer[0].clone()))

    handle = network.register_forward_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _curve(
    context: Context, name: str, network: nn.Module, calls: Sequence[Call], weights: Mapping[str, Tensor], prune: Prune
) -> tuple[tuple[float, float], ...]:
    import torch
    from torch.func import functional_call

    from modelgrove_plugins.compress.fidelity import epsilon_error

    full, points = {f"{name}/{key}": value.detach() for key, value in weights.items()}, list[tuple[float, float]]()
    for number, sparsity in enumerate(GRID):
        context.progress(0.0, f"{name} at {sparsity:.0%}, {number + 1} of {len(GRID)}")
        with torch.inference_mode():
            pruned = {key.partition("/")[2]: value for key, value in prune(full, sparsity).items()}

        def answer(*positional: Any, pruned: Mapping[str, Tensor] = pruned, **named: Any) -> Tensor:
            found: Tensor = functional_call(network, dict(pruned), positional, named)[0]
            return found

        points.append((sparsity, epsilon_error(answer, calls).overall))
    return tuple(points)
