"""Cross-attention in diffusers' networks: where it is, how much each token is attended to, rounded probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from modelgrove_hub.errors import UsageError

_PLAIN = ("AttnProcessor", "AttnProcessor2_0")
"""Classes of processors that compute softmax(q · kᵀ) · v and nothing else."""


def cross_attentions(network: nn.Module) -> dict[str, nn.Module]:
    """Paths and modules of those whose keys and values come from a caption and that can be rounded."""
    return {
        path: module
        for path, module in network.named_modules()
        if getattr(module, "is_cross_attention", False) and type(getattr(module, "processor", None)).__name__ in _PLAIN
    }


def change_probabilities(attention: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Let a module of `cross_attentions` weigh its values by changed probabilities (samples · heads, queries, keys)."""
    from diffusers.models.attention_processor import AttnProcessor

    # The fused processor never forms the probabilities.
    module: Any = attention
    module.set_processor(AttnProcessor())
    exact = module.get_attention_scores
    module.get_attention_scores = lambda *inputs: change(exact(*inputs))


def round_attention(network: nn.Module, path: str, bits: int, start: bool) -> None:
    """Round the probabilities of one cross-attention of `network` as `AttentionMap` says.

    Raises:
        UsageError: there is no such module, or it computes something else.
    """
    from modelgrove_kernels.probabilities import round_probabilities

    attention: Any = cross_attentions(network).get(path)
    if attention is None:
        raise UsageError(f"{path} is no cross-attention of this {type(network).__name__} that can be rounded")
    heads = int(attention.heads)
    change_probabilities(attention, lambda exact: round_probabilities(exact, bits, heads, start))


@contextmanager
def watched_peaks(network: nn.Module) -> Iterator[Mapping[str, list[Tensor]]]:
    """Path of each cross-attention → mean probability of each key, one tensor a call, while the context lasts.

    The network's processors are changed for good.
    """
    peaks: dict[str, list[Tensor]] = {}
    watching = True
    for path, attention in cross_attentions(network).items():
        seen = peaks.setdefault(path, [])

        def keep(exact: Tensor, seen: list[Tensor] = seen) -> Tensor:
            if watching:
                seen.append(exact.mean((0, 1)))
            return exact

        change_probabilities(attention, keep)
    yield peaks
    watching = False
