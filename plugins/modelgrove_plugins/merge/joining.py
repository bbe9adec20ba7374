"""Adapters become one adapter: read module by module, merge in common coordinates, truncate, write, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from modelgrove_hub.contracts import Context, InputModel, Output, Result
from modelgrove_hub.errors import DataError
from modelgrove_hub.formats.adapter_writing import AdapterWriter, written_component
from modelgrove_hub.formats.adapters import Factors
from modelgrove_hub.store.dtypes import DTYPES
from modelgrove_hub.tables import ModelKind, Relation
from modelgrove_plugins.merge.alignment import Alignment, Site, align
from modelgrove_plugins.merge.combining import Combined, combine
from modelgrove_plugins.merge.methods import Method
from modelgrove_plugins.merge.params import MergeParams
from modelgrove_plugins.merge.sparse import combine_sparse, is_sparse, join_sparse
from modelgrove_plugins.merge.tally import Tally, distinct

if TYPE_CHECKING:
    from modelgrove_kernels.lowrank import Merged


def join(
    context: Context, method: Method, params: MergeParams, models: Sequence[InputModel], weights: Sequence[float],
    metadata: Mapping[str, str], seed: int,
) -> Result:  # fmt: skip
    """Write one adapter; the report says how the inputs interfere and what the method and truncation cost.

    Raises:
        UsageError: the adapters do not belong together; see `align`.
        DataError: a file is broken, or a factor is not finite; the message names the tensor.
    """
    import torch

    alignment = align(models)
    if is_sparse(alignment, method, params):
        return join_sparse(context, method, params, alignment, weights, metadata, seed)
    tally = Tally(distinct([file.name for file in alignment.files]))
    components = {written_component(site.component, site.module) for site in alignment.sites}
    writer = AdapterWriter(context, params.naming, getattr(torch, params.dtype), metadata, components)
    for number, site in enumerate(alignment.sites):
        context.progress(number / len(alignment.sites), site.name)
        combined = combine_site(method, params, alignment, site, weights, seed)
        if combined.vector:
            writer.add_difference(site.component, site.module, site.parameter, combined.result.flatten())
        else:
            merged = _truncated(site, combined, params)
            tally.add(site, combined, merged)
            factors = merged.result.factors()
            writer.add(Factors(site.module, site.component, site.kernel, factors.down, factors.up))
    report = tally.report(alignment, weights)
    return Result((Output(writer.close(), Relation.MERGE, kind=ModelKind.ADAPTER),), report)


def combine_site(
    method: Method, params: MergeParams, alignment: Alignment, site: Site, weights: Sequence[float], seed: int
) -> Combined:
    """Read one module of all adapters and merge it.

    Raises:
        DataError: values are not finite, or too large to multiply.
    """
    if site.sparse and not method.spectral:
        support, combined = combine_sparse(method, params, site, weights, seed)
        return combined.lifted(support)
    updates = site.read()
    scaled = [weights[place] * params.strength(place, site.name) for place in updates]
    roundings = [_eps(alignment.files[place].dtype) for place in updates]
    try:
        return combine(method, site.name, updates, scaled, roundings, seed)
    except ValueError as error:
        raise DataError(f"module {site.name}: {error}") from error


def _eps(stored: str) -> float:
    """The relative rounding of a dtype: as large as the singular values that it may add to an update of norm one."""
    import torch

    return torch.finfo(torch.float32 if stored == "F64" else getattr(torch, str(DTYPES[stored].torch))).eps


def _truncated(site: Site, combined: Combined, params: MergeParams) -> Merged:
    from modelgrove_kernels.lowrank import truncate

    try:
        return truncate(combined.frame.decompose(combined.result), params.rank, params.energy)
    except ValueError as error:
        raise DataError(f"module {site.name}: {error}") from error
