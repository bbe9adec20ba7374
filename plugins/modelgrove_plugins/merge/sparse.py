"""Sparse adapters become one sparse adapter: merged on the places that any of them changes, as short vectors.

Those of one base and threshold change the same places, so that a matrix of n weights is a vector of n / 10 to n / 5
numbers. Shares of entries that a method keeps are therefore of the places, not of all weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

from modelgrove_hub.contracts import Context, Output, Result
from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.adapter_writing import written_component
from modelgrove_hub.formats.sara import FILE, Origin, SparseWriter
from modelgrove_hub.tables import ModelKind, Relation
from modelgrove_plugins.merge.alignment import Alignment, Site
from modelgrove_plugins.merge.combining import Combined, combine
from modelgrove_plugins.merge.interference import rounded
from modelgrove_plugins.merge.methods import Method
from modelgrove_plugins.merge.params import MergeParams
from modelgrove_plugins.merge.tally import distinct

if TYPE_CHECKING:
    from modelgrove_kernels.sparse import Support


def is_sparse(alignment: Alignment, method: Method, params: MergeParams) -> bool:
    """Whether the result is a sparse adapter: all inputs are, the method makes no matrix of them, no rank is wanted."""
    small = params.rank is not None or params.energy is not None
    return not small and not method.spectral and all(site.sparse for site in alignment.sites)


def combine_sparse(
    method: Method, params: MergeParams, site: Site, weights: Sequence[float], seed: int
) -> tuple[Support, Combined]:
    """Merge one parameter of sparse adapters on the places (1, k) that any of them changes.

    Raises:
        DataError: values are not finite.
        CorruptFileError: places are none of the tensor.
    """
    from modelgrove_kernels.sparse import gather

    updates = site.sparse or {}
    support, rows = gather([update.entries() for update in updates.values()], site.shape)
    scaled = [weights[place] * params.strength(place, site.name) for place in updates]
    try:
        return support, combine(method, site.name, dict(zip(updates, rows, strict=True)), scaled, seed=seed)
    except ValueError as error:
        raise DataError(f"module {site.name}: {error}") from error


def join_sparse(
    context: Context, method: Method, params: MergeParams, alignment: Alignment, weights: Sequence[float],
    metadata: Mapping[str, str], seed: int,
) -> Result:  # fmt: skip
    """Write one sparse adapter; the report says how much the inputs share and point the same way.

    Raises:
        UsageError: they are of different bases, nothing is left of them, or another naming is asked for.
        DataError: a file is broken, or values are not finite; the message names the tensor.
    """
    import torch

    if params.naming != "diffusers":
        raise UsageError(f"--naming {params.naming} has no names for single weights; with --rank the result is a LoRA")
    thresholds = [update.threshold for site in alignment.sites for update in (site.sparse or {}).values()]
    writer = SparseWriter(context.writer(FILE, {"format": "pt", **metadata}), max(thresholds))
    tally, rows = _Tally(len(weights)), []
    for number, site in enumerate(alignment.sites):
        context.progress(number / len(alignment.sites), site.name)
        origin = _origin(alignment, site)
        support, combined = combine_sparse(method, params, site, weights, seed)
        tally.add(combined)
        written = combined.result[0].to(getattr(torch, params.dtype))
        if not bool(written.isfinite().all()):
            raise DataError(f"module {site.name} would hold NaN or infinite values as {params.dtype}")
        if not bool(written.any()):
            continue
        kept = written != 0
        name = f"{written_component(site.component, site.module)}.{site.module}.{site.parameter}".lstrip(".")
        writer.add(name, support.places[kept], written[kept], origin)
        rows.append({"module": site.name, "adapters": len(site.targets), "changed": int(kept.sum())})
    if not rows:
        raise UsageError("nothing is left of the adapters: all changes are zero or cancel each other")
    report = {"warnings": list(alignment.warnings), "coverage": alignment.coverage(), "modules": rows}
    report |= tally.report(distinct([file.name for file in alignment.files]), weights)
    writer.close()
    return Result((Output((FILE,), Relation.MERGE, kind=ModelKind.ADAPTER),), report)


def _origin(alignment: Alignment, site: Site) -> Origin:
    """What all the updates of a parameter were made for."""
    updates = site.sparse or {}
    (first, update), *others = updates.items()
    for place, other in others:
        if other.origin != update.origin:
            raise UsageError(
                f"module {site.name}: {alignment.files[first].name} and {alignment.files[place].name} change single "
                "weights of different bases; with --rank or --base they are added as matrices"
            )
    return update.origin


@dataclass
class _Tally:
    """Sums over all modules."""

    count: int
    norms: list[float] = field(init=False)
    places: list[int] = field(init=False)
    products: dict[tuple[int, int], float] = field(default_factory=dict)
    shared: dict[tuple[int, int], int] = field(default_factory=dict)
    norm: float = 0.0

    def __post_init__(self) -> None:
        self.norms, self.places = [0.0] * self.count, [0] * self.count

    def add(self, combined: Combined) -> None:
        """Take a module in."""
        updates = dict(zip(combined.parts.places, combined.parts.updates, strict=True))
        for place, update in updates.items():
            self.norms[place] += float(update.square().sum())
            self.places[place] += int((update != 0).sum())
        for (i, one), (j, other) in combinations(updates.items(), 2):
            self.products[i, j] = self.products.get((i, j), 0.0) + float((one * other).sum())
            self.shared[i, j] = self.shared.get((i, j), 0) + int(((one != 0) & (other != 0)).sum())
        self.norm += float(combined.result.square().sum())

    def report(self, names: Sequence[str], weights: Sequence[float]) -> dict[str, Any]:
        """As JSON values: `shared` is a share of the smaller adapter's places."""
        return {
            "norm": rounded(self.norm**0.5, 5),
            "adapters": [
                {"name": name, "weight": weight, "changed": places, "norm": rounded(norm**0.5, 5)}
                for name, weight, places, norm in zip(names, weights, self.places, self.norms, strict=True)
            ],
            "pairs": [
                {
                    "a": names[i],
                    "b": names[j],
                    "cosine": rounded(product / length if (length := (self.norms[i] * self.norms[j]) ** 0.5) else 0.0),
                    "shared": rounded(self.shared[i, j] / max(1, min(self.places[i], self.places[j]))),
                }
                for (i, j), product in self.products.items()
            ],
        }
