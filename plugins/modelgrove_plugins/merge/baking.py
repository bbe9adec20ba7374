"""Adapters become a part of a base: its tensors are streamed, each with the merged update of its modules.

Sums are made in float32 and rounded once to the base's dtype: baking one adapter after the other into a file of 16 bits
would lose most of what each adds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelgrove_hub.contracts import Context, InputModel, LazyTensor, Output, Result
from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.adapters import FLOATS
from modelgrove_hub.formats.slots import Slot
from modelgrove_hub.rewriting import rewrite
from modelgrove_hub.store.tensors import all_finite
from modelgrove_hub.tables import Relation
from modelgrove_plugins.merge.alignment import Alignment, Site, align
from modelgrove_plugins.merge.interference import rounded
from modelgrove_plugins.merge.joining import combine_site
from modelgrove_plugins.merge.methods import Method
from modelgrove_plugins.merge.params import MergeParams

if TYPE_CHECKING:
    from torch import Tensor


def bake(
    context: Context, method: Method, params: MergeParams, models: Sequence[InputModel], base: InputModel,
    weights: Sequence[float], metadata: Mapping[str, str], seed: int,
) -> Result:  # fmt: skip
    """Write a copy of `base` with the adapters in it; the report says which modules found their place.

    Raises:
        UsageError: the adapters do not belong together or to the base, or none of their modules is in it.
        DataError: a file is broken, or values are not finite; the message names the tensor.
    """
    if params.rank is not None or params.energy is not None:
        raise UsageError("--rank and --energy shrink an adapter; a checkpoint has room for the exact update")
    alignment = align(models, base)
    by_tensor = _by_tensor(alignment, base)
    changes: list[dict[str, Any]] = []

    def change(tensor: LazyTensor) -> Tensor:
        sites = by_tensor.get(tensor.name)
        if not sites:
            return tensor.read()
        stored = tensor.read()
        values = stored.float().flatten(1) if stored.ndim > 1 else stored.float()
        before = float(values.norm())
        added = 0.0
        for site, slot in sites:
            part = slot.part_of(values).reshape(slot.shape)
            if method.rule is None:
                added += _add_sum(site, part, params, weights)
            else:
                combined = combine_site(method, params, alignment, site, weights, seed)
                part += combined.frame.lift(combined.result)
                added += float(combined.result.square().sum())
            slot.put(part, values)
        written = values.reshape(stored.shape).to(stored.dtype)
        if not (added < float("inf") and all_finite(written)):
            raise DataError(f"tensor {tensor.name} would hold NaN or infinite values as {tensor.dtype}")
        share = rounded(added**0.5 / before) if before else None
        changes.append({"tensor": tensor.name, "adapters": len(sites[0][0].targets), "change": share})
        return written

    files = rewrite(context, base, change, metadata)
    report = {
        "base": base.name,
        "warnings": list(alignment.warnings),
        "coverage": alignment.coverage(),
        "adapters": [{"name": file.name, "weight": weights[n]} for n, file in enumerate(alignment.files)],
        "tensors": changes,
    }
    return Result((Output(files, Relation.MERGE),), report)


def _by_tensor(alignment: Alignment, base: InputModel) -> dict[str, list[tuple[Site, Slot]]]:
    """The base's tensors by name, with what is added to them."""
    found: dict[str, list[tuple[Site, Slot]]] = defaultdict(list)
    for site in alignment.sites:
        if site.slot is not None:
            tensor = site.slot.tensor
            if tensor.dtype not in FLOATS:
                raise UsageError(
                    f"tensor {tensor.name} of {base.name} is {tensor.dtype}: adapters are baked into floating-point "
                    "weights, so take the model that it was compressed from"
                )
            found[tensor.name].append((site, site.slot))
    if not found:
        names = ", ".join(site.name for site in alignment.sites[:3])
        raise UsageError(f"none of the adapters' modules is in {base.name}, such as {names}")
    return found


def _add_sum(site: Site, part: Tensor, params: MergeParams, weights: Sequence[float]) -> float:
    """The weighted sum of factors is one product, whose norm follows from the Gram matrices of the factors."""
    from modelgrove_kernels.lowrank import LowRank, inner, stack

    updates = site.read()
    scaled = {place: weights[place] * params.strength(place, site.name) for place in updates}
    factored = {place: update for place, update in updates.items() if isinstance(update, LowRank)}
    total = 0.0
    if factored:
        whole = stack(tuple(factored.values()), [scaled[place] for place in factored])
        part.addmm_(whole.up, whole.down)
        total += inner(whole, whole)
    for place, update in updates.items():
        if not isinstance(update, LowRank):
            part += scaled[place] * update
            total += scaled[place] ** 2 * float(update.square().sum())
    return total
