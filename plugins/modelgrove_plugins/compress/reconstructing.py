"""Weights of a denoiser that are learned block by block, on what the blocks are given while the model itself paints.

A block is the innermost module whose class is called a block (`ResnetBlock2D`, `BasicTransformerBlock`, …); a layer
outside of all is one by itself. Blocks learn from the original's inputs and answers, so that their order does not
matter. (Inputs that come through blocks learned before were tried on the zoo's base: no gain, twice the passes.)
The loop and its sources are in kernels/reconstruction.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field

from modelgrove_hub.contracts import Context, InputModel
from modelgrove_plugins.compress.calibrating import MOST, CalibratedParams, Rehearsal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from modelgrove_kernels.calls import Call
    from modelgrove_kernels.reconstruction import Relaxed

R = TypeVar("R", bound="Relaxed")


class LearnedParams(CalibratedParams):
    """How long weights are learned."""

    iterations: int = Field(300, ge=0, le=100_000, description="Steps of learning for each block; 0 learns nothing.")


def learned(
    context: Context, model: InputModel, params: LearnedParams, relax: Callable[[str, Tensor], R | None]
) -> Iterator[tuple[str, R]]:
    """The names ("unet/…") of the denoiser's tensors that `params` take, with their learned weights, block by block.

    `relax` makes the weight to be learned from a name and the original, float32 in its layer's shape; None leaves it
    as it is. The blocks' calls are kept in batches of at most `MOST` bytes (or one block), for each of which the
    network runs once more.

    Raises:
        UsageError: the model cannot paint, or has no denoiser.
    """
    from modelgrove_kernels.calls import recorded
    from modelgrove_kernels.reconstruction import reconstruct

    rehearsal = Rehearsal(context, model, params)
    network, folder = rehearsal.network.requires_grad_(False), rehearsal.component
    weights = {name: weight for name, weight in network.named_parameters() if name.endswith(".weight")}
    wanted = [name for name, weight in weights.items() if params.takes_shape(f"{folder}/{name}", weight.shape)]
    blocks, done = blocks_of(network, wanted), 0
    with recorded(network) as calls:
        rehearsal.paint()
    for batch in _batches(network, blocks, calls):
        heard = _heard(network, batch, calls)
        for path in batch:
            relaxed = {name: relax(f"{folder}/{name}", weights[name].detach()) for name in blocks[path]}
            chosen = {name: weight for name, weight in relaxed.items() if weight is not None}
            inside = {name[len(path) + 1 :]: weight for name, weight in chosen.items()}
            if inside and params.iterations:
                progress = partial(_report, context, path, done / len(blocks), 1 / len(blocks))
                reconstruct(
                    network.get_submodule(path),
                    inside,
                    heard.pop(path),
                    params.iterations,
                    context.generator(),
                    progress,
                )
            yield from ((f"{folder}/{name}", weight) for name, weight in chosen.items())
            done += 1


def blocks_of(network: nn.Module, weights: Collection[str]) -> dict[str, list[str]]:
    """Paths of the blocks, in the network's order → those of `weights` ("conv_in.weight") that are in them."""
    modules = dict(network.named_modules())
    named = {path for path, module in modules.items() if path and "Block" in type(module).__name__}
    innermost = {path for path in named if not any(other.startswith(f"{path}.") for other in named)}
    found: dict[str, list[str]] = {}
    for name in weights:
        layer = name.rpartition(".")[0]
        home = next((path for path in _ancestors(layer) if path in innermost), layer)
        found.setdefault(home, []).append(name)
    return {path: found[path] for path in modules if path in found}


def _ancestors(path: str) -> Iterator[str]:
    parts = path.split(".")
    return (".".join(parts[:count]) for count in range(len(parts), 0, -1))


def _batches(network: nn.Module, blocks: Collection[str], calls: Sequence[Call]) -> Iterator[list[str]]:
    """Blocks whose calls fit into memory together, as the bytes of the first call tell."""
    first = {path: sum(map(_bytes, heard)) for path, heard in _heard(network, blocks, calls[:1]).items()}
    batch, size = list[str](), 0
    for path, more in first.items():
        if batch and size + more * len(calls) > MOST:
            yield batch
            batch, size = [], 0
        batch.append(path)
        size += more * len(calls)
    yield batch


def _bytes(call: Call) -> int:
    from modelgrove_kernels.calls import tensors_in

    return sum(tensor.nbytes for tensor in tensors_in((call.positional, call.named, call.output)))


def _heard(network: nn.Module, blocks: Collection[str], calls: Sequence[Call]) -> dict[str, list[Call]]:
    """What each block is given and answers while the network answers `calls`."""
    import torch

    from modelgrove_kernels.calls import Call, output_of

    heard: dict[str, list[Call]] = {path: [] for path in blocks}
    now = 0.0
    with ExitStack() as hooks, torch.no_grad():
        for path, into in heard.items():

            def keep(
                _block: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], answer: Any,
                into: list[Call] = into,
            ) -> None:  # fmt: skip
                into.append(Call(now, positional, dict(named), output_of(answer).clone()))

            hooks.callback(network.get_submodule(path).register_forward_hook(keep, with_kwargs=True).remove)
        for call in calls:
            now = call.timestep
            network(*call.positional, **call.named)
    return heard


def _report(context: Context, path: str, before: float, share: float, done: float) -> None:
    context.progress(0.8 * (before + share * done), f"learning {path}")
