"""What an encoder reads of a model: each layer's update as U·diag(S)·Vᵀ.

The update of a LoRA is B·A, that of a full fine-tune W − W_base (`deltas`). This form depends on the update
alone: not on the gauge (A, B) → (RA, BR⁻¹), not on how a file states alpha and rank. All products are done on it,
Xz = U(S∘Vᵀz), and the update of a LoRA is never formed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelgrove_hub.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_hub.formats.adapters import Factors
    from modelgrove_kernels.lowrank import Canonical


LARGEST = 1e6
"""Norm of an update; real ones are below a thousand. Fourth powers of it, which encoders take, fit into float32."""


Shape = tuple[int, int]
"""(out, in) of a layer."""


@dataclass(frozen=True)
class Updates:
    """One layer's updates of n models: `U` (n, out, k), `S` (n, k), `V` (n, in, k), float32.

    Directions that a model does not have, or the whole layer, are zero.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    @property
    def shape(self) -> Shape:
        """(out, in) of the layer."""
        return self.U.shape[1], self.V.shape[1]

    @property
    def T(self) -> Updates:  # noqa: N802  (as torch and numpy call it)
        """The updates Xᵀ."""
        return Updates(self.V, self.S, self.U)

    @property
    def squared(self) -> Updates:
        """The updates XXᵀ."""
        return Updates(self.U, self.S.square(), self.U)

    def rows(self, chosen: Tensor | slice) -> Updates:
        """The updates of some of the models."""
        return Updates(self.U[chosen], self.S[chosen], self.V[chosen])


def read_layers(updates: Iterable[tuple[str, Factors | Tensor]], columns: int) -> dict[str, Canonical]:
    """The `columns` leading directions of every module's update, factors or a matrix; those that are zero do not occur.

    Raises:
        DataError: an update is too large to reckon with.
    """
    layers = {}
    for module, update in updates:
        found = _leading(module, update, columns)
        if found.norm > 0:
            # Kohya's flat names do not always get their dots back.
            layers[module.replace(".", "_")] = found
    return layers


def _leading(module: str, update: Factors | Tensor, columns: int) -> Canonical:
    from torch import Tensor

    from modelgrove_kernels.lowrank import LowRank, canonical, leading

    try:
        if isinstance(update, Tensor):
            found = leading(update, columns)
        else:
            found = canonical(LowRank(update.up, update.down)).first(columns)
    except ValueError as error:
        raise DataError(f"the update of {module} cannot be read: {error}") from error
    if not found.norm < LARGEST:
        raise DataError(f"the update of {module} has the norm {found.norm:g}, at most {LARGEST:g} is believed")
    return found


def common_layers(models: Sequence[Mapping[str, Canonical]]) -> dict[str, Shape]:
    """The layers that at least half of the models have; see `common_shapes`."""
    return common_shapes([{layer: _shape(update) for layer, update in model.items()} for model in models])


def common_shapes(models: Sequence[Mapping[str, Shape]]) -> dict[str, Shape]:
    """The layers that at least half of the models have, sorted; of several shapes the commonest counts."""
    shapes: dict[str, Counter[Shape]] = {}
    for model in models:
        for layer, shape in model.items():
            shapes.setdefault(layer, Counter())[shape] += 1
    found = {layer: counts.most_common(1)[0] for layer, counts in sorted(shapes.items())}
    return {layer: shape for layer, (shape, count) in found.items() if 2 * count >= len(models)}


def stacked(models: Sequence[Mapping[str, Canonical]], shapes: Mapping[str, Shape]) -> dict[str, Updates]:
    """The updates of all models by layer; zero where a model lacks the layer or has it in another shape."""
    import torch

    found = {}
    for layer, (out, width) in shapes.items():
        own = {i: m[layer] for i, m in enumerate(models) if layer in m and _shape(m[layer]) == (out, width)}
        most = max((update.rank for update in own.values()), default=1)
        n = len(models)
        U, S, V = torch.zeros(n, out, most), torch.zeros(n, most), torch.zeros(n, width, most)
        for i, update in own.items():
            U[i, :, : update.rank], S[i, : update.rank], V[i, :, : update.rank] = update.U, update.S, update.V
        found[layer] = Updates(U, S, V)
    return found


def require_known(name: str, layers: Mapping[str, Canonical], shapes: Mapping[str, Shape]) -> None:
    """Make sure that an expert that knows `shapes` can place the model `name`.

    Raises:
        DataError: the model changes no layer that is known, or has one in another shape.
    """
    known = layers.keys() & shapes.keys()
    if not known:
        raise DataError(f"{name} changes none of the expert's layers, such as {next(iter(shapes))}")
    for layer in sorted(known):
        if _shape(layers[layer]) != shapes[layer]:
            sizes = f"shape {_shape(layers[layer])}, the expert knows {shapes[layer]}"
            raise DataError(f"layer {layer} of {name} has {sizes}: it belongs to another base model")


def _shape(update: Canonical) -> Shape:
    return update.U.shape[0], update.V.shape[0]
