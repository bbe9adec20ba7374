"""How every layer of a base answers to every word: what an adapter would have to do to mean that word.

The base draws a word by changing what its layers put out. An adapter trained on pictures of the same thing
under a prompt that says nothing makes its layers put out the same change. So for layer l with the inputs
x (positions, in) under a neutral prompt, and the outputs o(w) (positions, out) under the word w at the same
noised latent,

    G_l(w) = Σ_positions (o(w) − mean_w o(w)) xᵀ

is the weight update, up to scale, that answers the neutral prompt with the word: the first gradient step of
½ Σ‖ΔW x − (o(w) − o)‖². Only the leading directions Z (in, m) of the inputs are kept: x ≈ Y Zᵀ, G_l(w) Z = oᵀ Y.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

    from modelgrove_analyzers.encoders.denoiser import Denoiser

NEUTRAL = "a picture of an object"
TIMESTEP = 750
"""Of a thousand: early enough for a word to decide what is drawn. A second one told no more (decision 0009)."""
DIRECTIONS = 4
"""m, the input directions kept."""
_BATCH = 64


class Response(NamedTuple):
    """One layer's: `inputs` Z (in, m) with orthonormal columns, `words` G(w)Z (words, out·m), of mean zero."""

    inputs: Tensor
    words: Tensor


def responses(
    denoiser: Denoiser,
    words: Sequence[str],
    layers: Collection[str],
    progress: Callable[[float], None] = lambda _done: None,
) -> dict[str, Response]:
    """The response of each linear layer named in `layers` ("_" for every "."), float32."""
    import torch

    with torch.inference_mode(), _captured(denoiser, layers) as (modules, seen):
        if not modules:
            return {}
        latent, time = _noised(denoiser)
        denoiser.unet(latent, time, denoiser.states([NEUTRAL]))
        leading = {name: _leading(seen[name][0]) for name in modules}
        found: dict[str, list[Tensor]] = {name: [] for name in modules}
        for start in range(0, len(words), _BATCH):
            progress(start / len(words))
            asked = words[start : start + _BATCH]
            denoiser.unet(latent.repeat(len(asked), 1, 1, 1), time, denoiser.states(asked))
            for name, (_, weights) in leading.items():
                outputs = seen[name][1].view(len(asked), len(weights), -1)
                found[name].append(torch.einsum("wpo,pm->wom", outputs, weights).flatten(1))
        stacked = {name: torch.cat(parts) for name, parts in found.items()}
    return {name: Response(leading[name][0].clone(), (rows - rows.mean(0)).clone()) for name, rows in stacked.items()}


def _noised(denoiser: Denoiser) -> tuple[Tensor, Tensor]:
    """A latent (1, c, h, w), noise around the mean picture, which is zero, and its timestep ()."""
    import torch

    time = torch.tensor(TIMESTEP * len(denoiser.alphas_cumprod) // 1000)
    noise = torch.randn(1, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    return noise * (1 - denoiser.alphas_cumprod[time]).sqrt(), time


def _leading(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Z (in, m) and Y (positions, m) of inputs (positions, in) ≈ Y Zᵀ."""
    import torch

    U, S, Vh = torch.linalg.svd(inputs, full_matrices=False)
    return Vh[:DIRECTIONS].T, U[:, :DIRECTIONS] * S[:DIRECTIONS]


@contextmanager
def _captured(
    denoiser: Denoiser, layers: Collection[str]
) -> Iterator[tuple[list[str], dict[str, tuple[Tensor, Tensor]]]]:
    """The layers there are, and a place where each pass leaves their inputs and outputs, (positions, width)."""
    import torch

    wanted = set(layers)
    modules = {
        name.replace(".", "_"): module
        for name, module in denoiser.unet.named_modules()
        if isinstance(module, torch.nn.Linear) and name.replace(".", "_") in wanted
    }
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = inputs[0].flatten(0, -2), output.flatten(0, -2)

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield list(modules), seen
    finally:
        for handle in handles:
            handle.remove()
