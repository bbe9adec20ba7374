"""What changed from one model to another: layer by layer, and in plain words.

Checkpoints are compared tensor by tensor; ranks of differences count singular values above what
rounding to the stored types alone would give. Adapters are compared by their products, because
the same update has many factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from pydantic import Field

from modelgrove_hub.contracts import API, Context, InputModel, Kind, Params, Result
from modelgrove_hub.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from modelgrove_analyzers.heritage.change import Change
    from modelgrove_hub.store.tensors import StoredTensor


Cast: TypeAlias = tuple[str, int]
"""A type, and which of the two models (0 or 1) is the other one rounded to it."""


class DiffParams(Params):
    """How closely to look."""

    ranks: bool = Field(True, description="Count the rank of each layer's change.")
    exact_to: int = Field(1024, ge=16, le=8192, description="Smaller side up to which ranks are exact.")
    layers: int = Field(2000, ge=1, le=100_000, description="Layers in the report, the most changed first.")


class Diff:
    """Compare inputs[0] with inputs[1], both checkpoints or both adapters."""

    name: ClassVar[str] = "diff"
    kind: ClassVar[Kind] = Kind.ANALYZER
    api: ClassVar[int] = API
    summary: ClassVar[str] = "What changed between two models: per-layer change, its rank above rounding, a sentence."
    paper: ClassVar[str] = "Horwitz et al., Unsupervised Model Tree Heritage Recovery (arXiv 2405.18432), section 4"
    Params: ClassVar[type[Params]] = DiffParams

    def run(self, context: Context, params: DiffParams) -> Result:
        """Report the summary, the changed layers, and tensors that only one of the two has."""
        if len(context.inputs) != 2:
            raise UsageError(f"diff compares two models, not {len(context.inputs)}")
        kinds = {bool(model.adapter_type) for model in context.inputs}
        if len(kinds) == 2:
            raise UsageError(
                f"{context.inputs[0].name} and {context.inputs[1].name} are an adapter and a full model: "
                "compare adapter with adapter, or the model with its base"
            )
        report = _adapters(context, params) if kinds == {True} else _checkpoints(context, params)
        return Result(report=report)


def _checkpoints(context: Context, params: DiffParams) -> dict[str, Any]:
    from modelgrove_analyzers.heritage.facts import lazy_tensors, plain_files, weight_files
    from modelgrove_analyzers.heritage.story import tell, with_article

    before, after = context.inputs
    files = [plain_files(model, context.temp) for model in (before, after)]
    mine, theirs = (lazy_tensors(part) for part in files)
    packed = files != [weight_files(before), weight_files(after)]
    pairs = _pairs(context, mine, theirs)
    changes, cast = _measure(context, pairs, params, ranks=params.ranks and not packed)
    used = {other.name for _, other in pairs.values()}
    missing = [key for key in mine if key not in pairs]
    extra = [key for key, tensor in theirs.items() if key not in pairs and tensor.name not in used]
    names = (before.name, after.name)
    if packed and not cast and _small(changes):
        cast = _packing(files, (before, after))
    copy = f"{names[cast[1]]} is {with_article(cast[0])} copy of {names[not cast[1]]}" if cast else ""
    summary = tell(changes, missing, extra, copy, names)
    rounding = cast[0] if cast else ""
    return {"summary": summary, "rounding": rounding, "missing": missing, "extra": extra, **_table(changes, params)}


def _packing(plain: Sequence[Mapping[str, Path]], models: Sequence[InputModel]) -> Cast | None:
    """The form of the one of two models that is packed; of two packed ones, neither is the other's copy."""
    from modelgrove_analyzers.heritage.facts import weight_files
    from modelgrove_hub.formats.quantized import manifest_of

    packed = [side for side in (0, 1) if plain[side] != weight_files(models[side])]
    if len(packed) != 1:
        return None
    manifests = (manifest_of(file) for file in weight_files(models[packed[0]]).values())
    forms = {entry.form for manifest in manifests if manifest for entry in manifest.tensors.values()}
    return " and ".join(sorted(forms)) or "quantized", packed[0]


def _pairs(
    context: Context, mine: Mapping[str, StoredTensor], theirs: Mapping[str, StoredTensor]
) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """Tensors of one shape by key; when hardly any key is common, by what is in them."""
    pairs = {key: (t, theirs[key]) for key, t in mine.items() if key in theirs and t.shape == theirs[key].shape}
    if 2 * len(pairs) >= min(len(mine), len(theirs)):
        return pairs
    from modelgrove_analyzers.heritage.facts import facts_of
    from modelgrove_analyzers.heritage.matching import match

    found = match(*(facts_of(model, context.temp) for model in context.inputs))
    return {key: (mine[key], theirs[other]) for key, other in found.items() if mine[key].shape == theirs[other].shape}


def _measure(
    context: Context, pairs: Mapping[str, tuple[StoredTensor, StoredTensor]], params: DiffParams, *, ranks: bool
) -> tuple[list[Change], Cast | None]:
    """All changes, and the one cast that explains them, if any."""
    from modelgrove_analyzers.heritage.change import measure
    from modelgrove_analyzers.heritage.rounding import MANTISSA, ROUNDINGS

    changes: list[Change] = []
    possible = [(rounding, side) for side in (1, 0) for rounding in ROUNDINGS if rounding.casts]
    for number, (key, (a, b)) in enumerate(pairs.items()):
        context.progress(number / len(pairs), key)
        before, after = a.read(), b.read()
        floats = a.dtype in MANTISSA and b.dtype in MANTISSA
        changes.append(measure(key, before, after, (a.dtype, b.dtype) if ranks and floats else None, params.exact_to))
        if changes[-1].changed:
            both = (after, before)
            possible = [
                (way, side)
                for way, side in possible
                if floats and bool((way.apply(both[side]) == both[not side].float()).all())
            ]
    if not possible or not any(change.changed for change in changes):
        return changes, None
    return changes, (possible[0][0].name, possible[0][1])


def _small(changes: Sequence[Change]) -> bool:
    """Whether all changes are such as quantization to four bits or more makes."""
    return all(change.relative < 0.25 for change in changes)


def _adapters(context: Context, params: DiffParams) -> dict[str, Any]:
    from modelgrove_analyzers.heritage.products import by_module, compare_products, tell_products
    from modelgrove_hub.formats.adapters import read_adapter

    before, after = context.inputs
    mine, theirs = by_module(read_adapter(before)), by_module(read_adapter(after))
    common = [name for name in mine if name in theirs and mine[name].shape == theirs[name].shape]
    changes = []
    for number, name in enumerate(common):
        context.progress(number / len(common), name)
        changes.append(compare_products(name, mine[name], theirs[name]))
    missing = [name for name in mine if name not in common]
    extra = [name for name in theirs if name not in common]
    summary = tell_products(changes, missing, extra, (before.name, after.name))
    return {"summary": summary, "missing": missing, "extra": extra, **_table(changes, params)}


def _table(changes: Sequence[Any], params: DiffParams) -> dict[str, Any]:
    ordered = sorted((change for change in changes if change.changed), key=lambda change: -change.relative)
    return {
        "compared": len(changes),
        "changed": len(ordered),
        "layers": [asdict(change) for change in ordered[: params.layers]],
        "left_out": max(0, len(ordered) - params.layers),
    }
