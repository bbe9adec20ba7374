"""Find copies among models: exact, re-saved, renamed, in part, cast or quantized; and say how we know.

A false accusation is worse than a miss: what the sketches suggest is read in full (unless
`confirm` is off), and only a whole match is called a copy. Fine-tunes, merges and siblings are
not copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from modelgrove_hub.contracts import API, Context, InputModel, Params, Result
from modelgrove_hub.contracts import Kind as PluginKind

if TYPE_CHECKING:
    from modelgrove_analyzers.heritage.facts import Facts
    from modelgrove_analyzers.heritage.verdict import Verdict


class CopiesParams(Params):
    """What to compare and how sure to be."""

    first_only: bool = Field(False, description="Compare the first model with each other one, and no more.")
    confirm: bool = Field(True, description="Read the weights of suspects in full before calling them copies.")


class Copies:
    """Compare models by the facts of ingest, then read the suspects."""

    name: ClassVar[str] = "copies"
    kind: ClassVar[PluginKind] = PluginKind.ANALYZER
    api: ClassVar[int] = API
    summary: ClassVar[str] = (
        "Which models are copies of which: exact, re-saved, renamed, cast, quantized; with evidence."
    )
    paper: ClassVar[str] = "Horwitz et al., Charting and Navigating Hugging Face's Model Atlas (arXiv 2503.10633)"
    Params: ClassVar[type[Params]] = CopiesParams

    def run(self, context: Context, params: CopiesParams) -> Result:
        """Report every pair of inputs that is a copy or undecided."""
        from modelgrove_analyzers.heritage.facts import facts_of
        from modelgrove_analyzers.heritage.verdict import Kind, compare

        models, facts = context.inputs, []
        for number, model in enumerate(models):
            context.progress(0.5 * number / len(models), model.name)
            facts.append(facts_of(model, context.temp, number))
        judged = [compare(a, b) for a, b in _candidates(facts, params.first_only)]
        if params.confirm:
            judged = list(_read(context, [verdict for verdict in judged if verdict.kind is not Kind.NONE]))
        found = [describe(verdict, models) for verdict in judged if verdict.kind not in (Kind.NONE, Kind.SUSPECT)]
        return Result(report={"models": len(models), "pairs": found, "edges": [*_edges(found)]})


def _edges(pairs: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for pair in pairs:
        if relation := RELATIONS.get(pair["verdict"]):
            evidence = {**pair["evidence"], "text": pair["text"], "precision": pair["precision"]}
            ends = {"child": pair["child_revision"], "parent": pair["parent_revision"]}
            yield {**ends, "relation": relation, "score": 1.0, "evidence": evidence}


def describe(verdict: Verdict, models: Sequence[InputModel]) -> dict[str, Any]:
    """A verdict as JSON values, with a sentence for people."""
    from modelgrove_analyzers.heritage.story import with_article

    child, parent = models[verdict.child], models[verdict.parent]
    sentence = _SENTENCES[verdict.kind.name]
    return {
        "verdict": verdict.kind.value,
        "child": child.name,
        "parent": parent.name,
        "child_revision": child.revision_id,
        "parent_revision": parent.revision_id,
        "precision": verdict.precision,
        "text": sentence.format(
            child=child.name, parent=parent.name, precision=with_article(verdict.precision or "rounded")
        ),
        "evidence": dict(verdict.evidence),
    }


RELATIONS = {
    "exact copy": "copy",
    "re-saved copy": "copy",
    "renamed copy": "copy",
    "quantized copy": "quantized",
}
"""Verdicts that become edges of the lineage. A part is no copy, and what is undecided is no fact."""

_SENTENCES = {
    "EXACT": "{child} is {parent}: the same files",
    "RESAVED": "{child} is {parent}, saved again: the same values",
    "RENAMED": "{child} is {parent} under other tensor names",
    "PART": "{child} is a part of {parent}: all its tensors are in it",
    "QUANTIZED": "{child} is {precision} copy of {parent}",
    "UNDECIDED": "{child} is close to {parent}, and may be {precision} copy or a slight change of it",
}


def _candidates(facts: Sequence[Facts], first_only: bool) -> Iterable[tuple[Facts, Facts]]:
    if first_only:
        return ((facts[0], other) for other in facts[1:])
    return combinations(facts, 2)


def _read(context: Context, verdicts: Sequence[Verdict]) -> Iterator[Verdict]:
    """The verdicts after reading both models, wherever hashes of all bytes did not decide."""
    from modelgrove_analyzers.heritage.reading import confirm, is_gridded
    from modelgrove_analyzers.heritage.verdict import Kind

    models = context.inputs
    gridded = cache(lambda number: is_gridded(models[number]))  # once a model, not once a pair
    for done, verdict in enumerate(verdicts):
        tell = partial(context.progress, 0.5 + 0.5 * done / len(verdicts), f"reading {models[verdict.child].name}")
        tell()
        if not verdict.pairs:
            yield verdict
            continue
        # An integer grid is no cast: on which side it is, only the values tell.
        sides = (verdict, verdict.turned()) if verdict.kind is Kind.SUSPECT else (verdict,)
        for side in sides:
            if side.kind is not Kind.SUSPECT or gridded(side.child):
                yield confirm(side, models[side.parent], models[side.child], context.temp, tell)
