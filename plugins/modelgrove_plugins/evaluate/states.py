"""Saved states of one training, and any combination Σ αₖθₖ of them set in a live denoiser, Σ αₖ being one.

Checkpoints are combined tensor by tensor. Adapters change θ₀ to θ₀ + Δₖ, so the combination is θ₀ + Σ αₖΔₖ: one product
of their factors side by side, scaled in blocks, for each module. Both are what `merger.sum` writes, before rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from modelgrove_hub.contracts import Context, InputModel, LazyTensor
from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.adapter_keys import flat
from modelgrove_hub.formats.adapters import FLOATS
from modelgrove_kernels.lowrank import LowRank, stack
from modelgrove_plugins.evaluate.live import Live
from modelgrove_plugins.merge.alignment import Site, align
from modelgrove_plugins.merge.mixing import matching
from modelgrove_plugins.preview.diffusers import open_painter
from modelgrove_plugins.preview.fusing import layers_of

if TYPE_CHECKING:
    from torch.nn import Parameter

MOST = 2 << 30
"""Bytes of states that are kept in memory; what is beyond is read again for every combination."""


@dataclass
class _Place:
    """A parameter of the network, and what the states have for it."""

    name: str
    parameter: Parameter
    read: Callable[[], list[LowRank | Tensor]]
    origin: Tensor | None
    """Its values without any adapter; None of checkpoints, which have values of their own."""
    kept: list[LowRank | Tensor] | None = None

    def states(self) -> list[LowRank | Tensor]:
        """From memory or from disk."""
        return self.read() if self.kept is None else self.kept

    def set(self, coefficients: Sequence[float]) -> None:
        """Give the parameter the combination, computed in float32."""
        total = torch.zeros_like(self.parameter.data) if self.origin is None else self.origin.clone()
        states = list(zip(self.states(), coefficients, strict=True))
        factored = [(state, weight) for state, weight in states if isinstance(state, LowRank)]
        if factored:
            whole = stack([state for state, _ in factored], [weight for _, weight in factored])
            total += (whole.up @ whole.down).reshape(total.shape)
        for state, weight in states:
            if isinstance(state, Tensor):
                total.add_(state.float().reshape(total.shape), alpha=weight)
        self.parameter.data.copy_(total)


class States:
    """Saved states in a pipeline that paints.

    `base` is the one that adapters are for, None of checkpoints. The pipeline is the base's, or that of the last state.

    Raises:
        UsageError: the states are of different kinds, have other modules or tensors, change more than the denoiser, or
            cannot paint.
        DataError: a file is broken; the message names the tensor.
    """

    def __init__(self, context: Context, models: Sequence[InputModel], base: InputModel | None) -> None:
        kinds = {model.adapter_type is not None: model.name for model in models}
        if len(kinds) > 1:
            raise UsageError(
                f"{kinds[True]} is an adapter and {kinds[False]} is none: states of one training are alike"
            )
        root = models[-1]
        if True in kinds:
            root = _base_of(models, base)
        elif base is not None:
            raise UsageError(
                f"checkpoints are combined by themselves, with shares that add up to one: leave {base.name} away"
            )
        self.count = len(models)
        with TemporaryDirectory(dir=context.temp) as folder:  # all is read when it is open
            self.live = Live(open_painter(root, Path(folder)), root.name)
        component, network = self.live.component, self.live.network
        self._places = (
            _adapted(models, root, component, network) if True in kinds else _whole(models, component, network)
        )
        self._keep()

    def set(self, coefficients: Sequence[float]) -> None:
        """Give the denoiser the combination with these coefficients, one for each state."""
        for place in self._places:
            place.set(coefficients)

    def _keep(self) -> None:
        """Read all once, which finds what is broken, and keep what fits."""
        room = MOST
        for place in self._places:
            states = place.read()
            room -= sum(_bytes(state) for state in states)
            if room >= 0:
                place.kept = states


def _base_of(adapters: Sequence[InputModel], base: InputModel | None) -> InputModel:
    known = base or next((model.base for model in adapters if model.base), None)
    if known is None:
        raise UsageError("adapters are scored in their base: register it, or give it with --base")
    return known


def _whole(models: Sequence[InputModel], component: str, network: nn.Module) -> list[_Place]:
    template = models[0]
    columns = [matching(model, template) for model in models]
    parameters, places = dict(network.named_parameters()), []
    hash_of = cache(lambda place, file: models[place].sha256(file))
    for tensor in template.tensors():
        column = [known[tensor.name] for known in columns]
        folder, _, name = tensor.name.partition("/")
        if folder != component:
            hashes = [hash_of(place, other.file) for place, other in enumerate(column)]
            _refuse_changes(column, hashes, models, component)
        elif tensor.dtype in FLOATS:
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise UsageError(f"tensor {tensor.name} {tensor.shape} is not one of this {type(network).__name__}")
            places.append(_Place(tensor.name, parameters[name], partial(_read_tensors, column), None))
    return places


def _refuse_changes(
    column: Sequence[LazyTensor], hashes: Sequence[str], models: Sequence[InputModel], component: str
) -> None:
    """Refuse a tensor that differs and cannot be scored; files with the same hash need no look."""
    for place, tensor in enumerate(column):
        if hashes[place] != hashes[0] and not torch.equal(tensor.read(), column[0].read()):
            raise UsageError(
                f"tensor {tensor.name} of {models[place].name} is not that of {models[0].name}: "
                f"only the {component} can be scored, so only that may differ"
            )


def _read_tensors(tensors: Sequence[LazyTensor]) -> list[LowRank | Tensor]:
    found: list[LowRank | Tensor] = []
    for tensor in tensors:
        values = tensor.read()
        if not bool(values.isfinite().all()):
            raise DataError(f"tensor {tensor.name} holds NaN or infinite values in one of the models")
        found.append(values)
    return found


def _adapted(adapters: Sequence[InputModel], base: InputModel, component: str, network: nn.Module) -> list[_Place]:
    alignment = align(adapters, base)
    layers = dict(layers_of({component: network}))
    places = []
    for site in alignment.sites:
        if missing := [adapters[place].name for place in range(len(adapters)) if place not in site.targets]:
            raise UsageError(f"{missing[0]} has no module {site.name}: states of one training have the same modules")
        layer = layers.get(flat(f"{component}.{site.module}")) if site.component in ("", component) else None
        parameter = getattr(layer, site.parameter, None)
        if parameter is None or parameter.numel() != site.shape[0] * site.shape[1]:
            raise UsageError(f"module {site.name} is none of the {component} of {base.name}: only that can be scored")
        places.append(_Place(site.name, parameter, partial(_read_updates, site), parameter.data.clone()))
    return places


def _read_updates(site: Site) -> list[LowRank | Tensor]:
    return list(site.read().values())


def _bytes(state: LowRank | Tensor) -> int:
    return state.nbytes if isinstance(state, Tensor) else state.up.nbytes + state.down.nbytes
