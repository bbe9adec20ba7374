"""How much adapters will get in each other's way, told before they are merged, from their factors alone.

The energy-weighted crosstalk of b on a is ‖Δ_b V_a S_a‖ / ‖Δ_a V_a S_a‖: what b answers to the inputs that a was made
for, as a share of a's own answer. Beside it stand the signed cosine of the updates, the overlaps of their input and
output directions with the chance level of random ones, and what the sum will measure. `crosstalk.svg` shows every pair
in every block. Where the base is known and can paint, it is asked (`asking.py`): what it answers is the better measure,
and the verdicts go by it. They are those of `verdicts.py`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from math import prod
from typing import Any, ClassVar

from pydantic import Field

from modelgrove_hub.contracts import API, Context, InputModel, Kind, Params, Result
from modelgrove_hub.errors import UsageError
from modelgrove_plugins.merge.alignment import Alignment, align
from modelgrove_plugins.merge.asking import measure
from modelgrove_plugins.merge.heatmap import draw
from modelgrove_plugins.merge.interference import PairTable, rounded
from modelgrove_plugins.merge.joining import combine_site
from modelgrove_plugins.merge.merging import parted
from modelgrove_plugins.merge.methods import Method
from modelgrove_plugins.merge.params import MergeParams
from modelgrove_plugins.merge.tally import Tally, distinct
from modelgrove_plugins.merge.verdicts import suggestion, verdict
from modelgrove_plugins.merge.wording import prompts_of

PLOT = "crosstalk.svg"
_SUM = Method("sum")
_SHOWN = ("a", "b", "crosstalk_of_b_on_a", "crosstalk_of_a_on_b", "shared_modules")
"""What is told of a pair in a block."""
_UNASKED = 100_000_000
"""Parameters of a base up to which it is asked without being told to."""


class CrosstalkParams(Params):
    """The strengths that the adapters would be merged with, and whether their base is asked."""

    weights: tuple[float, ...] = Field((), description="One strength for each adapter, in order; 1 each if not given.")
    base: bool = Field(False, description="The last input is the base, which is asked instead of the registered one.")
    ask: bool | None = Field(None, description="Ask the base what the adapters do; unset: up to 100 M parameters.")
    prompts: tuple[str, ...] = Field(
        (), max_length=64, description="What the base paints for it; unset: what each adapter is asked for by."
    )


class Crosstalk:
    """Measure every pair of adapters, block by block, and say how to merge them."""

    name: ClassVar[str] = "crosstalk"
    kind: ClassVar[Kind] = Kind.ANALYZER
    api: ClassVar[int] = API
    summary: ClassVar[str] = "How much adapters would disturb each other if they were merged, and by which method to."
    paper: ClassVar[str] = "crosstalk after Po et al., Orthogonal Adaptation (CVPR 2024)"
    Params: ClassVar[type[Params]] = CrosstalkParams

    def run(self, context: Context, params: CrosstalkParams) -> Result:
        """Report norms, pairs, blocks, a verdict for every pair and a suggestion; nothing is merged.

        Raises:
            UsageError: the adapters do not belong together, or the weights do not fit.
            DataError: a file is broken; the message names the tensor.
        """
        models, base = parted(context.inputs, based=params.base)
        if not models or any(model.adapter_type is None for model in models):
            whole = next((model.name for model in models if model.adapter_type is None), "nothing")
            raise UsageError(f"{whole} is no adapter: crosstalk is told of adapters")
        alignment = align(models, base)
        names = distinct([file.name for file in alignment.files])
        merging = MergeParams(weights=params.weights or (1.0,) * len(names))
        if len(merging.weights) != len(names):
            raise UsageError(f"{len(names)} adapters need as many weights, not {len(merging.weights)}")
        tally, blocks = Tally(names), defaultdict[str, PairTable](lambda: PairTable(names))
        for number, site in enumerate(alignment.sites):
            context.progress(0.5 * number / len(alignment.sites), site.name)
            combined = combine_site(_SUM, merging, alignment, site, merging.weights, context.seed)
            if combined.vector:
                continue
            tally.add(site, combined)
            parts = combined.parts
            blocks[_block(site.component, site.module)].add(
                site.name, parts.places, parts.forms, parts.forms, site.shape
            )
        summed = tally.report(alignment, merging.weights)
        rows, asked = _asked(context, params, models, base, alignment, summed["pairs"], merging.weights)
        pairs = [{**row, "verdict": verdict(row)} for row in rows]
        by_block = {block: table.rows() for block, table in blocks.items()}
        context.path(PLOT).write_text(_plot(pairs, by_block), "utf-8")
        report = {
            **{key: summed[key] for key in ("warnings", "coverage", "adapters", "norm", "norm_if_independent")},
            "pairs": pairs,
            "blocks": {block: [{key: row[key] for key in _SHOWN} for row in rows] for block, rows in by_block.items()},
            "asked": asked,
            "suggestion": suggestion(pairs, merging.weights),
        }
        return Result(report=report, artefacts=(PLOT,))


def _asked(
    context: Context, params: CrosstalkParams, models: Sequence[InputModel], base: InputModel | None,
    alignment: Alignment, rows: list[dict[str, Any]], weights: Sequence[float],
) -> tuple[list[dict[str, Any]], str]:  # fmt: skip
    """The rows with the damage that the base showed; and the base's name, or why it was not asked."""
    known = base or next((model.base for model in models if model.base), None)
    if params.ask is False or len(models) < 2:
        return rows, "not asked for"
    if known is None:
        return rows, "no base is registered, and none was given with --base"
    size = sum(prod(tensor.shape) for tensor in known.tensors())
    if params.ask is None and size > _UNASKED:
        return rows, f"{known.name} has {size / 1e6:.0f} M parameters; --ask takes the time that it takes"
    prompts = [params.prompts or prompts_of(model) for model in models]
    try:
        found = measure(context, known, alignment.files, weights, prompts)
    except UsageError as error:
        if params.ask:
            raise
        return rows, str(error)
    places = list(combinations(range(len(models)), 2))
    damages = [(rounded(found[i, j]), rounded(found[j, i])) for i, j in places]
    return [
        {**row, "damage_of_b_on_a": on_a, "damage_of_a_on_b": on_b}
        for row, (on_a, on_b) in zip(rows, damages, strict=True)
    ], known.name


def _block(component: str, module: str) -> str:
    """The component, and the module's name up to its first number: "unet down_blocks.1"."""
    found = re.match(r".*?\.\d+(?=\.|$)", module)
    return f"{component} {found[0] if found else module.split('.', 1)[0]}".strip()


def _plot(pairs: list[dict[str, Any]], blocks: dict[str, list[dict[str, Any]]]) -> str:
    columns = ["all", *blocks]
    rows = []
    for place, pair in enumerate(pairs):
        for a, b, key in ((pair["a"], pair["b"], "crosstalk_of_b_on_a"), (pair["b"], pair["a"], "crosstalk_of_a_on_b")):
            shared = {block: found[place][key] for block, found in blocks.items() if found[place]["shared_modules"]}
            rows.append((f"{b} on {a}", {"all": pair[key], **shared}))
    return draw(rows, columns, "Crosstalk: what an adapter answers to another one's inputs")
