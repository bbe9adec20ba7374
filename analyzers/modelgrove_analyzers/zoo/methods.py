"""LoRA and three of its kin: how each starts on a linear layer, and how N of them act on it at once.

With s = α/r, frozen weights W₀ (out, in) and a bias that stays as it is:

    LoRA   W = W₀ + s·BA                                 Hu et al., arXiv 2106.09685, section 4.1
    LoHa   W = W₀ + s·(B₁A₁) ∘ (B₂A₂)                    Hyeon-Woo et al., arXiv 2108.06098, proposition 1
    DoRA   W = m ∘ (W₀ + s·BA) / ‖W₀ + s·BA‖             Liu et al., arXiv 2402.09353, equations 5 and 11

Orthogonal is a LoRA whose A is frozen to columns of a basis that all share (Po et al., arXiv 2312.02432).
DoRA's norms are those of the outputs' rows, as in PEFT, and take no part in the gradient (section 4.3).
All parts are matrices: A (r, in), B (out, r), m (out, 1). A row of A and its column of B that are zero add
nothing and get no gradient, so smaller ranks can be padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from modelgrove_analyzers.zoo.recipes import Method, Recipe
from modelgrove_hub.errors import UsageError
from modelgrove_kernels.shared_basis import columns

Parts = tuple[Tensor, ...]


@dataclass(frozen=True)
class Algebra:
    """What a method does. Stacked parts of N adapters have N in front; `scale` is (N, 1, 1)."""

    start: Callable[[nn.Linear, Recipe, Generator], Parts]
    """The parts that leave the layer as it is, of the recipe's rank."""
    act: Callable[[nn.Linear, Sequence[Tensor], Tensor, Tensor, Tensor], Tensor]
    """The layer's outputs (N, t, out) from its parts, scale, inputs (N, t, in) and frozen outputs (N, t, out)."""
    difference: Callable[[nn.Linear, Sequence[Tensor], Tensor], Tensor]
    """W − W₀ (N, out, in)."""
    frozen: frozenset[int] = frozenset()
    """Places of the parts that are not trained."""


def _start_lora(layer: nn.Linear, recipe: Recipe, generator: Generator) -> Parts:
    """A Kaiming-uniform (as peft does it), B zero."""
    down = torch.empty(recipe.rank, layer.in_features)
    nn.init.kaiming_uniform_(down, a=5**0.5, generator=generator)
    return down, torch.zeros(layer.out_features, recipe.rank)


def _start_orthogonal(layer: nn.Linear, recipe: Recipe, _generator: Generator) -> Parts:
    """A the recipe's columns of the basis, B zero."""
    own = recipe.columns
    if own is None or own.stop > layer.in_features:
        raise UsageError(
            f"{recipe.concept} cannot be trained in {own or 'no columns'}: a layer has {layer.in_features} inputs"
        )
    return columns(layer.in_features, own.seed, own.start, own.rank).T.clone(), torch.zeros(
        layer.out_features, own.rank
    )


def _start_loha(layer: nn.Linear, recipe: Recipe, generator: Generator) -> Parts:
    """Normal with the deviations that LyCORIS takes, B₂ zero."""
    rank = recipe.rank
    down, second = (torch.empty(rank, layer.in_features).normal_(generator=generator) for _ in range(2))
    up = torch.empty(layer.out_features, rank).normal_(std=0.1, generator=generator)
    return down, up, second, torch.zeros(layer.out_features, rank)


def _start_dora(layer: nn.Linear, recipe: Recipe, generator: Generator) -> Parts:
    """A LoRA that does nothing yet, and m = ‖W₀‖."""
    return *_start_lora(layer, recipe, generator), layer.weight.detach().norm(dim=1, keepdim=True)


def _product(_layer: nn.Linear, parts: Sequence[Tensor], scale: Tensor) -> Tensor:
    down, up = parts[:2]
    return scale * (up @ down)


def _hadamard(_layer: nn.Linear, parts: Sequence[Tensor], scale: Tensor) -> Tensor:
    down, up, second_down, second_up = parts
    return scale * (up @ down) * (second_up @ second_down)


def _renormalised(layer: nn.Linear, parts: Sequence[Tensor], scale: Tensor) -> Tensor:
    moved = layer.weight + _product(layer, parts, scale)
    norms: Tensor = moved.norm(dim=-1, keepdim=True).detach()
    return parts[2] / norms * moved - layer.weight


def _act_low_rank(_layer: nn.Linear, parts: Sequence[Tensor], scale: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    down, up = parts
    return outputs + ((inputs @ down.mT) @ up.mT) * scale


def _act_by(difference: Callable[[nn.Linear, Sequence[Tensor], Tensor], Tensor]) -> Callable[..., Tensor]:
    def act(layer: nn.Linear, parts: Sequence[Tensor], scale: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
        return outputs + inputs @ difference(layer, parts, scale).mT

    return act


METHODS: Mapping[Method, Algebra] = {
    Method.LORA: Algebra(_start_lora, _act_low_rank, _product),
    Method.LOHA: Algebra(_start_loha, _act_by(_hadamard), _hadamard),
    Method.DORA: Algebra(_start_dora, _act_by(_renormalised), _renormalised),
    Method.ORTHOGONAL: Algebra(_start_orthogonal, _act_low_rank, _product, frozen=frozenset({0})),
}
