"""What every merger of LoRAs does around its method: read module by module, sum exactly, write, report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from modelgrove_hub.contracts import Context, Output, Params, Result, TensorWriter
from modelgrove_hub.errors import UsageError
from modelgrove_hub.formats.adapters import WEIGHTS, Factors, adapter_metadata, write_factors
from modelgrove_hub.store.dtypes import DTYPES
from modelgrove_hub.tables import ModelKind, Relation
from modelgrove_plugins.merge.alignment import Alignment, Site, align
from modelgrove_plugins.merge.interference import PairTable, rounded

if TYPE_CHECKING:
    from modelgrove_kernels.lowrank import Canonical, LowRank, Merged

RECIPE = "modelgrove.merge"
"""Metadata key: how the file was made, as JSON."""

Repair = Callable[[Sequence["Canonical"]], "list[LowRank]"]
"""Changes the updates of one module so that they disturb each other less."""


class MergeParams(Params):
    """The choices that all mergers of LoRAs share."""

    weights: tuple[float, ...] = Field((), description="One strength for each adapter, in order; 1 each if not given.")
    rank: int | None = Field(None, ge=1, description="Largest rank of the result; as exact as possible if not given.")
    energy: float | None = Field(
        None, gt=0, le=1, description="Keep the fewest directions of each layer with this share of its squared norm."
    )
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="What the factors are stored as.")

    @field_validator("weights")
    @classmethod
    def _finite(cls, weights: tuple[float, ...]) -> tuple[float, ...]:
        if any(not abs(weight) < float("inf") for weight in weights):
            raise ValueError("a weight is a finite number")
        return weights


@dataclass
class _Tally:
    """What is summed up over the modules."""

    before: PairTable
    after: PairTable
    squares: list[dict[str, float]]
    """For each adapter: sums over its modules of squared norms, and of ranks."""
    modules: list[dict[str, Any]] = field(default_factory=list)
    ranks: dict[tuple[str, str], int] = field(default_factory=dict)
    norm: float = 0.0
    lost: float = 0.0


def join(context: Context, method: str, params: MergeParams, repair: Repair | None = None) -> Result:
    """Merge all inputs into one LoRA: Σ wᵢ·Δᵢ, each Δ passed through `repair` first if there is one.

    Raises:
        UsageError: weights do not fit, or the adapters do not belong together; see `align`.
        DataError: a file is broken, or a factor is not finite; the message names the tensor.
    """
    weights = params.weights or (1.0,) * len(context.inputs)
    if not context.inputs or len(weights) != len(context.inputs):
        raise UsageError(f"{len(context.inputs)} adapters need as many weights, not {len(weights)}")
    alignment = align(context.inputs)
    names = _distinct([file.name for file in alignment.files])
    tally = _Tally(PairTable(names), PairTable(names), [{} for _ in names])
    writer = context.writer(WEIGHTS, _recipe(context, method, params, weights))
    for number, site in enumerate(alignment.sites):
        context.progress(number / len(alignment.sites), site.module)
        _join_site(alignment, site, weights, params, repair, writer, tally)
    for key, value in adapter_metadata(tally.ranks).items():
        writer.describe(key, value)
    report = _report(alignment, names, weights, tally, repaired=repair is not None)
    for warning in report["warnings"]:
        context.log(f"warning: {warning}")
    return Result((Output((WEIGHTS,), Relation.MERGE, kind=ModelKind.ADAPTER),), report)


def _join_site(
    alignment: Alignment, site: Site, weights: Sequence[float], params: MergeParams, repair: Repair | None,
    writer: TensorWriter, tally: _Tally,
) -> None:  # fmt: skip
    import torch

    from modelgrove_kernels.lowrank import LowRank, canonical, merge

    places = sorted(site.targets)
    factors = {place: site.targets[place].read() for place in places}
    updates = [LowRank(factors[place].up, factors[place].down) for place in places]
    stored = [alignment.files[place].dtype for place in places]
    forms = [_above_rounding(canonical(update), dtype) for update, dtype in zip(updates, stored, strict=True)]
    tally.before.add(site.module, places, forms, forms)
    if repair is not None:
        updates = repair(forms)
        tally.after.add(site.module, places, forms, [_present(canonical(update)) for update in updates])
    _note(tally, places, forms, updates)
    merged = merge(updates, [weights[place] for place in places], params.rank, params.energy)
    _note_result(tally, site, sum(update.rank for update in updates), merged)
    result = merged.result.factors()
    write_factors(
        Factors(site.module, site.component, site.kernel, result.down, result.up), writer, getattr(torch, params.dtype)
    )


def _above_rounding(form: Canonical, stored: str) -> Canonical:
    """Only the directions that the stored dtype could tell from its own rounding."""
    import torch

    from modelgrove_kernels.subspace import rounding_floor

    dtype = torch.float32 if stored == "F64" else getattr(torch, str(DTYPES[stored].torch))
    return form.above(rounding_floor(form.norm, dtype))


def _present(form: Canonical) -> Canonical:
    """Without the directions that a repair has taken away, of which rounding is left."""
    return form.above(1e-5 * float(form.S[:1].sum()))


def _note(tally: _Tally, places: Sequence[int], forms: Sequence[Canonical], updates: Sequence[LowRank]) -> None:
    from modelgrove_kernels.lowrank import inner
    from modelgrove_kernels.subspace import entropy_rank

    for place, form, update in zip(places, forms, updates, strict=True):
        found = {
            "norm": form.norm**2,
            "rank": form.rank,
            "entropy_rank": entropy_rank(form.S),
            "kept": max(inner(update, update), 0.0),
            "along": inner(form.factors(), update),
        }
        sums = tally.squares[place]
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value


def _note_result(tally: _Tally, site: Site, available: int, merged: Merged) -> None:
    total = merged.result.norm**2 / max(1 - merged.error**2, 1e-12)
    tally.norm += total
    tally.lost += total * merged.error**2
    tally.ranks[site.component, site.module] = merged.result.rank
    row = {"module": site.module, "adapters": len(site.targets), "rank_of_parts": available, "rank": merged.result.rank}
    tally.modules.append({**row, "error": rounded(merged.error, 3)})


def _recipe(context: Context, method: str, params: MergeParams, weights: Sequence[float]) -> dict[str, str]:
    inputs = [{"name": model.name, "weight": weight} for model, weight in zip(context.inputs, weights, strict=True)]
    recipe = {"method": method, **params.model_dump(mode="json", exclude={"weights"}), "inputs": inputs}
    return {RECIPE: json.dumps(recipe), "modelspec.merged_from": ", ".join(model.name for model in context.inputs)}


def _report(
    alignment: Alignment, names: Sequence[str], weights: Sequence[float], tally: _Tally, *, repaired: bool
) -> dict[str, Any]:
    adapters = [
        _adapter_row(name, weight, sums, len(file.targets), repaired=repaired)
        for name, weight, sums, file in zip(names, weights, tally.squares, alignment.files, strict=True)
    ]
    warnings = [*alignment.warnings, *(_loss(row) for row in adapters if row.get("energy_kept", 1.0) < 0.5)]
    report: dict[str, Any] = {
        "relative_error": rounded((tally.lost / tally.norm) ** 0.5 if tally.norm else 0.0, 3),
        "norm": rounded(tally.norm**0.5, 5),
        "norm_if_independent": rounded(_independent(weights, tally.squares), 5),
        "warnings": warnings,
        "coverage": alignment.coverage(),
        "adapters": adapters,
        "pairs": tally.before.rows(),
    }
    if repaired:
        report["pairs_after"] = tally.after.rows()
    return {**report, "modules": tally.modules}


def _adapter_row(
    name: str, weight: float, sums: Mapping[str, float], modules: int, *, repaired: bool
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": name,
        "weight": weight,
        "norm": rounded(sums["norm"] ** 0.5, 5),
        "effective_rank": round(sums["rank"] / modules, 2),
        "entropy_rank": round(sums["entropy_rank"] / modules, 2),
    }
    if repaired:
        row["energy_kept"] = rounded(sums["kept"] / sums["norm"] if sums["norm"] else 1.0)
        length = (sums["kept"] * sums["norm"]) ** 0.5
        row["cosine_with_original"] = rounded(sums["along"] / length if length else 0.0)
    return row


def _loss(row: Mapping[str, Any]) -> str:
    return f"{row['name']} keeps only {row['energy_kept']:.0%} of its energy"


def _independent(weights: Sequence[float], squares: Sequence[Mapping[str, float]]) -> float:
    """The norm of the sum if no two adapters had anything in common."""
    return math.sqrt(sum(weight**2 * sums["norm"] for weight, sums in zip(weights, squares, strict=True)))


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered where one model is merged with itself."""
    numbered = [f"{name} ({names[:place].count(name) + 1})" for place, name in enumerate(names)]
    return [new if names.count(name) > 1 else name for name, new in zip(names, numbered, strict=True)]
