"""The tree of a family of checkpoints: what each model is to which other, with evidence and a probability.

Sketches and norms of ingest decide; weights are read in two cases alone: what may be an integer quantization, and the
ranks of three changed matrices where a LoRA may have been merged in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from modelgrove_hub.contracts import API, Context, InputModel, Kind, Params, Result
from modelgrove_hub.errors import UsageError

if TYPE_CHECKING:
    from modelgrove_analyzers.heritage.ancestry import Origin, Space
    from modelgrove_analyzers.heritage.facts import Facts
    from modelgrove_analyzers.heritage.verdict import Verdict

_NEAREST = 3
"""Neighbours that a model may be a copy of."""
_READ = 3
"""Matrices whose ranks show a merged LoRA."""
_LOW_RANK = 128
"""The highest rank that one is taken to have."""
_DECIDED = 0.5
"""Probability below which a parent is proposed and not called."""
_SAID = {"undecided": "may come from", "fine-tune": "is a fine-tune of"}


class TreeParams(Params):
    """What is known besides the weights."""

    times: list[float] = Field([], description="When each model appeared, in seconds; empty: unknown.")
    slack: float = Field(3600.0, ge=0, description="Seconds up to which two models are taken for simultaneous.")
    root: int | None = Field(None, ge=0, description="Number of the model that all others come from, if known.")
    confirm: bool = Field(True, description="Read suspected quantizations, and three matrices of suspected LoRAs.")


class Tree:
    """Find the parent of each checkpoint among the others."""

    name: ClassVar[str] = "tree"
    kind: ClassVar[Kind] = Kind.ANALYZER
    api: ClassVar[int] = API
    summary: ClassVar[str] = "Which checkpoint came from which: fine-tunes, merges with weights, copies; with evidence."
    paper: ClassVar[str] = "Horwitz et al., Charting and Navigating Hugging Face's Model Atlas (arXiv 2503.10633)"
    Params: ClassVar[type[Params]] = TreeParams

    def run(self, context: Context, params: TreeParams) -> Result:
        """Report every model with its parent, and those that are unrelated or undecided."""
        from modelgrove_analyzers.heritage.ancestry import find_origins, space_of
        from modelgrove_analyzers.heritage.facts import facts_of

        models = context.inputs
        _check(models, params)
        facts = []
        for number, model in enumerate(models):
            context.progress(0.8 * number / len(models), model.name)
            facts.append(facts_of(model, context.temp, number))
        first = params.root or 0
        likeness = _correlations(facts, first)
        kin = [number for number, found in enumerate(likeness) if found is None or found >= _kin()]
        ordered = [first, *(number for number in kin if number != first)]
        space, kept = space_of([facts[number] for number in ordered])
        known = [ordered[place] for place in kept]
        copies = _copies(context, space, [facts[number] for number in known], params)
        rest = [place for place, number in enumerate(known) if number not in copies]
        times = [params.times[known[place]] for place in rest] if params.times else None
        root = rest.index(0) if params.root is not None and 0 in rest else None
        origins = find_origins(space.of(rest), times, root, params.slack)
        rows = {}
        for place, origin in zip(rest, origins, strict=True):
            parents = [known[rest[number]] for number in _parents(origin)]
            rows[known[place]] = _row(context, facts, known[place], parents, origin, params)
        rows |= {number: _copy_row(models, verdict) for number, verdict in copies.items()}
        apart = ((number, found) for number, found in enumerate(likeness) if number not in rows)
        rows.update([(number, _stranger(models[number], models[first], found)) for number, found in apart])
        found = [rows[number] for number in range(len(models))]
        # New members may stand between two others: what was inferred of them before is no longer so.
        return Result(report={"models": found, "edges": [*_edges(found)], "replaced": ["finetune", "merge"]})


def _edges(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    from modelgrove_analyzers.heritage.copies import RELATIONS

    relations = {**RELATIONS, "fine-tune": "finetune", "LoRA merged in": "finetune", "merge": "merge"}
    for row in rows:
        for parent in row["parent_revisions"] if row["verdict"] in relations else ():
            yield {
                "child": row["revision"], "parent": parent, "relation": relations[row["verdict"]],
                "score": row["probability"], "evidence": {**row["evidence"], "text": row["text"]},
            }  # fmt: skip


def _check(models: Sequence[InputModel], params: TreeParams) -> None:
    if any(model.adapter_type for model in models):
        names = ", ".join(model.name for model in models if model.adapter_type)
        raise UsageError(
            f"tree compares checkpoints, and these are adapters: {names}. `modelgrove similar` finds theirs"
        )
    if params.times and len(params.times) != len(models):
        raise UsageError(f"times: {len(params.times)} for {len(models)} models; give one for each, or none")
    if params.root is not None and params.root >= len(models):
        raise UsageError(f"root: number {params.root} of {len(models)} models; the first is 0")


def _kin() -> float:
    from modelgrove_hub.registry.kinship import RELATED

    return RELATED


def _correlations(facts: Sequence[Facts], first: int) -> list[float | None]:
    """Of the sampled matrices of each model with those of one; None where too few are common."""
    from modelgrove_hub.registry.kinship import weights_of

    weights = [weights_of(model.tensors.values()) for model in facts]
    return [own.correlation(weights[first]) if own is not weights[first] else 1.0 for own in weights]


def _copies(context: Context, space: Space, facts: Sequence[Facts], params: TreeParams) -> dict[int, Verdict]:
    """Copies of any kind, by the number of the copy: each model is compared with its nearest neighbours alone.

    Same values are looked for first, then casts, then integer grids, so that no copy is the parent of another one.
    """
    from modelgrove_analyzers.heritage.reading import confirm, is_gridded
    from modelgrove_analyzers.heritage.verdict import Kind as Found
    from modelgrove_analyzers.heritage.verdict import compare

    models = context.inputs
    gridded = cache(lambda number: is_gridded(models[number]))
    found: dict[int, Verdict] = {}
    for kinds in ((Found.EXACT, Found.RESAVED, Found.RENAMED), (Found.QUANTIZED,), (Found.SUSPECT,)):
        for place, own in enumerate(facts):
            near = [int(n) for n in space.from_one(place).argsort() if n != place and facts[n].number not in found]
            for other in near[:_NEAREST] if own.number not in found else ():
                verdict = compare(own, facts[other])
                called = verdict.kind in kinds
                if called and verdict.kind is Found.SUSPECT:
                    called = params.confirm and gridded(own.number)
                    side = verdict if verdict.child == own.number else verdict.turned()
                    verdict = (
                        confirm(side, models[side.parent], models[side.child], context.temp, _quiet) if called else side
                    )
                    called = verdict.kind is Found.QUANTIZED
                if called and verdict.child == own.number:
                    found[own.number] = verdict
                    break
    return found


def _quiet() -> None:
    """Reading two models tells no progress of its own."""


def _parents(origin: Origin) -> list[int]:
    return list(origin.members) or ([] if origin.parent is None else [origin.parent])


def _row(
    context: Context, facts: Sequence[Facts], number: int, parents: Sequence[int], origin: Origin, params: TreeParams
) -> dict[str, Any]:
    """One model that is no copy, for the report."""
    models = context.inputs
    child = models[number]
    if not parents:
        return _facts(child, "root", [], 1.0, f"nothing here is older than {child.name}", {})
    measured: dict[str, Any] = {
        "relative_change": origin.relative,
        "kept": origin.kept,
        "kept_of_nearer": origin.passed_over,
        "gain": origin.gain,
    }
    if origin.members:
        weights = dict(zip((models[parent].name for parent in parents), origin.members.values(), strict=True))
        mix = " + ".join(f"{weight:.2f} × {name}" for name, weight in weights.items())
        told = f"{child.name} is a merge: {mix}"
        return _facts(child, "merge", [models[n] for n in parents], origin.probability, told, measured) | {
            "weights": list(origin.members.values())
        }
    [parent] = parents
    verdict = "fine-tune" if origin.probability >= _DECIDED else "undecided"
    text = f"{child.name} {_SAID[verdict]} {models[parent].name}"
    ranks = _ranks(context, facts[parent], facts[number]) if params.confirm else {}
    if ranks:
        verdict, measured = "LoRA merged in", {**measured, "ranks": ranks}
        text = f"{child.name} is {models[parent].name} with a LoRA of rank {max(ranks.values())} merged in"
    return _facts(child, verdict, [models[parent]], origin.probability, text, measured)


def _ranks(context: Context, parent: Facts, child: Facts) -> dict[str, int]:
    """Ranks of three changed matrices if a LoRA made the change: matrices alone moved, at low rank above rounding."""
    from modelgrove_analyzers.heritage.change import measure
    from modelgrove_analyzers.heritage.facts import lazy_tensors, numel, plain_files

    if parent.packed or child.packed:
        return {}
    common = [key for key in parent.tensors if key in child.tensors]
    changed = [key for key in common if parent.tensors[key].sha256 != child.tensors[key].sha256]
    matrices = [key for key in changed if len(parent.tensors[key].shape) >= 2]
    if len(matrices) < len(changed) or not changed or len(changed) == len(common):
        return {}
    sides = [lazy_tensors(plain_files(context.inputs[one.number], context.temp)) for one in (parent, child)]
    ranks: dict[str, int] = {}
    for key in sorted(matrices, key=lambda key: (numel(parent.tensors[key]), key))[-_READ:]:
        before, after = (side[key] for side in sides)
        if before.shape != after.shape:
            return {}
        change = measure(key, before.read(), after.read(), (before.dtype, after.dtype), 1024)
        if change.rank is None or change.at_least or not 0 < change.rank <= min(_LOW_RANK, change.side // 4):
            return {}
        ranks[key] = change.rank
    return ranks


def _copy_row(models: Sequence[InputModel], verdict: Verdict) -> dict[str, Any]:
    from modelgrove_analyzers.heritage.copies import describe

    told = describe(verdict, models)
    return _facts(
        models[verdict.child], verdict.kind.value, [models[verdict.parent]], 1.0, told["text"], verdict.evidence
    )


def _stranger(model: InputModel, first: InputModel, correlation: float | None) -> dict[str, Any]:
    from modelgrove_hub.registry.kinship import UNRELATED

    apart = correlation is not None and correlation < UNRELATED
    text = f"{model.name} did not grow from the same weights as {first.name}"
    told = text if apart else f"too little of {model.name} is like {first.name}, or comparable, to tell"
    return _facts(model, "unrelated" if apart else "undecided", [], 0.0, told, {"correlation": correlation})


def _facts(
    model: InputModel, verdict: str, parents: Sequence[InputModel], probability: float, text: str,
    evidence: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    return {
        "name": model.name, "revision": model.revision_id, "verdict": verdict,
        "parents": [parent.name for parent in parents],
        "parent_revisions": [parent.revision_id for parent in parents],
        "probability": round(probability, 3), "text": text, "evidence": dict(evidence),
    }  # fmt: skip
