"""How much a change of one weight moves a whole network's output, for many changes at once.

To first order W + ΔW moves the output by J vec(ΔW), with J the Jacobian of the output. For random signs u,
E_u ⟨∂(uᵀy) / ∂W, ΔW⟩² = ‖J vec(ΔW)‖² (Hutchinson's estimator of tr(ΔWᵀ Jᵀ J ΔW)), so that one backward pass
probes all changes of all weights. With n probes the relative standard deviation of the sum is about √(2 / n). Unlike
the Hessian of a loss, none is needed: the output itself is what shall stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from modelgrove_kernels.calls import Call, output_of, picked

BATCH = 8
"""Samples of one probe; random signs keep them apart."""

Differences = Callable[[], Sequence[Tensor]]
"""What a weight may be changed by, float32 of its shape: made when asked for, once a probe."""


def sensitivities(
    network: nn.Module,
    changes: Mapping[str, Differences],
    calls: Sequence[Call],
    probes: int,
    generator: torch.Generator,
    progress: Callable[[float], None] = lambda _done: None,
) -> dict[str, list[float]]:
    """Name of a parameter → ‖ΔY‖² / ‖Y‖² of the network's outputs for each change of it alone.

    The parameters' gradients are made one weight at a time and dropped at once.
    """
    sums = {name: [0.0] * len(differences()) for name, differences in changes.items()}
    energy = 0.0
    network.requires_grad_(False)
    with ExitStack() as hooks:
        for name, differences in changes.items():
            weight = network.get_parameter(name).requires_grad_(True)
            hooks.callback(weight.requires_grad_, False)

            def probe(weight: Tensor, into: list[float] = sums[name], differences: Differences = differences) -> None:
                gradient, weight.grad = weight.grad, None
                if gradient is not None:
                    for place, difference in enumerate(differences()):
                        into[place] += float(torch.dot(gradient.flatten(), difference.flatten())) ** 2

            hooks.callback(weight.register_post_accumulate_grad_hook(probe).remove)  # type: ignore[no-untyped-call]
        for done in range(probes):
            call = picked(calls, BATCH, generator)
            answer = output_of(network(*call.positional, **call.named))
            signs = torch.randint(0, 2, answer.shape, generator=generator) * 2.0 - 1
            energy += float(answer.detach().square().sum())
            torch.autograd.backward((answer * signs).sum())
            progress((done + 1) / probes)
    return {name: [value / energy if energy else 0.0 for value in values] for name, values in sums.items()}
