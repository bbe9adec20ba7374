"""Checkpoints become one checkpoint, tensor by tensor: by their differences from a base, or by their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from modelgrove_hub.contracts import Context, InputModel, LazyTensor, Output, Result
from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.adapter_keys import module_of
from modelgrove_hub.formats.adapters import FLOATS, full_key
from modelgrove_hub.rewriting import rewrite
from modelgrove_hub.store.tensors import all_finite
from modelgrove_hub.tables import Relation
from modelgrove_plugins.merge.combining import combine
from modelgrove_plugins.merge.interference import rounded
from modelgrove_plugins.merge.methods import Method
from modelgrove_plugins.merge.params import MergeParams

if TYPE_CHECKING:
    from torch import Tensor

_SHOWN = 3


def mix(
    context: Context, method: Method, params: MergeParams, models: Sequence[InputModel], base: InputModel | None,
    weights: Sequence[float], metadata: Mapping[str, str], seed: int,
) -> Result:  # fmt: skip
    """Write a checkpoint with the tensors of the base, or of the first model: W₀ + merge(Wᵢ − W₀), float32 inside.

    Without a base weights are merged instead of differences, with strengths that add up to one.

    Raises:
        UsageError: the method needs a base, the models have other tensors, or shapes differ.
        DataError: values are not finite; the message names the tensor.
    """
    if params.rank is not None or params.energy is not None:
        raise UsageError("--rank and --energy shrink an adapter; checkpoints keep their shapes")
    if base is None:
        weights = _shares(method, models, weights)
    template = base or models[0]
    columns = [matching(model, template) for model in models]
    moved: list[float] = [0.0] * len(models)
    changed = 0

    def change(tensor: LazyTensor) -> Tensor:
        nonlocal changed
        stored = tensor.read()
        if tensor.dtype not in FLOATS:
            return stored
        origin = _matrix(stored) if base is not None else None
        updates = {place: _matrix(column[tensor.name].read()) for place, column in enumerate(columns)}
        if origin is not None:
            updates = {place: update - origin for place, update in updates.items()}
        for place, update in updates.items():
            moved[place] += float(update.norm()) ** 2
        module = module_of(full_key(tensor))
        scaled = [weights[place] * params.strength(place, module) for place in updates]
        if origin is None and scaled == weights and all(update.equal(updates[0]) for update in updates.values()):
            result = updates[0]  # shares of one, without the rounding of their sum
        else:
            try:
                combined = combine(method, tensor.name, updates, scaled, seed=seed)
            except ValueError as error:
                raise DataError(f"tensor {tensor.name}: {error}") from error
            result = combined.result if origin is None else origin + combined.result
        written = result.reshape(stored.shape).to(stored.dtype)
        if not all_finite(written):
            raise DataError(
                f"tensor {tensor.name} holds NaN or infinite values in one of the models, or would as {tensor.dtype}"
            )
        changed += 1
        return written

    files = rewrite(context, template, change, metadata)
    report = {
        "base": base.name if base else None,
        "warnings": [],
        "merged_tensors": changed,
        "models": [
            {"name": model.name, "weight": rounded(weight), "norm": rounded(norm**0.5, 5)}
            for model, weight, norm in zip(models, weights, moved, strict=True)
        ],
    }
    return Result((Output(files, Relation.MERGE),), report)


def _shares(method: Method, models: Sequence[InputModel], weights: Sequence[float]) -> list[float]:
    if not method.whole:
        raise UsageError(
            f"{method.name} merges what models changed, so it needs to know from what: give their base with --base"
        )
    total = sum(weights)
    if not total:
        raise UsageError(f"without a base the weights of {len(models)} checkpoints must not add up to zero")
    return [weight / total for weight in weights]


def matching(model: InputModel, template: InputModel) -> dict[str, LazyTensor]:
    """The model's tensors by name, all that the template has, in its shapes."""
    found = {tensor.name: tensor for tensor in model.tensors()}
    wanted = {tensor.name: tensor for tensor in template.tensors()}
    if missing := [name for name in wanted if name not in found]:
        raise UsageError(
            f"{model.name} lacks {len(missing)} tensors of {template.name}, such as {', '.join(missing[:_SHOWN])}"
        )
    if more := [name for name in found if name not in wanted]:
        raise UsageError(
            f"{model.name} has {len(more)} tensors that {template.name} lacks, such as {', '.join(more[:_SHOWN])}"
        )
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            raise UsageError(
                f"tensor {name} is {found[name].shape} in {model.name} but {tensor.shape} in {template.name}"
            )
        if (found[name].dtype in FLOATS) != (tensor.dtype in FLOATS):
            raise UsageError(
                f"tensor {name} is {found[name].dtype} in {model.name} but {tensor.dtype} in {template.name}"
            )
    return found


def _matrix(values: Tensor) -> Tensor:
    """float32, (out, in·kernel); a vector is a row."""
    return values.float().flatten(1) if values.ndim > 1 else values.float().reshape(1, -1)
