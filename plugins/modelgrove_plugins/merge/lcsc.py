"""LCSC: the linear combination of saved checkpoints that scores best, coefficients free in sign and size.

An exponential moving average of a training's states is one combination of them; better ones exist that neither it nor
the training reaches. They are searched for by evolution on a score of real pictures. What wins a search may have won
by luck with these pictures, so half of them are held back: the best five are scored again on those, beside the best
single state and the best average, and the best of these is written. The paper searches with FID; here the evaluator is
a plugin. Its code has no search, so the evolution is ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from pydantic import Field, field_validator

from modelgrove_hub.contracts import API, Context, Evaluator, InputModel, Kind, Params, Picture, Result
from modelgrove_hub.errors import PluginError, UsageError
from modelgrove_hub.plugins import check_params, get_plugin
from modelgrove_plugins.evaluate.pictures import read_pictures
from modelgrove_plugins.evaluate.scoring import PICTURES, ROOM, absolute, seed_of
from modelgrove_plugins.merge.evolution import AVERAGE, SINGLE, Candidate, Evolution, starts
from modelgrove_plugins.merge.interference import rounded
from modelgrove_plugins.merge.merging import merge, parted
from modelgrove_plugins.merge.methods import Method
from modelgrove_plugins.merge.params import MergeParams

TRAIL = "candidates.json"
"""Artefact: every candidate that was scored."""
_OWN = frozenset({"pictures", "base", "seed"})
"""Parameters that evaluators need to report on models, and which are decided here."""
_BEST = 5
_FEWEST = 4


class LcscParams(MergeParams):
    """The choices of all mergers but strengths, which are what is searched for; and how it is searched."""

    pictures: Path = Field(description=PICTURES)
    evaluator: str = Field(
        "denoising-loss", description="The analyzer that scores candidates, as denoising-loss, frechet."
    )
    scoring: tuple[str, ...] = Field((), description="NAME=VALUE: a parameter of the evaluator, as times=4.")
    candidates: int = Field(200, ge=1, le=100_000, description="Combinations to score, those of the start among them.")
    population: int = Field(12, ge=2, le=1000, description="Combinations that the next ones are bred from.")
    sigma: float = Field(0.5, gt=0, le=100, description="Standard deviation of the first mutations of a coefficient.")

    @field_validator("pictures")
    @classmethod
    def _absolute(cls, pictures: Path) -> Path:
        return absolute(pictures)

    @field_validator("scoring")
    @classmethod
    def _named(cls, scoring: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [one for one in scoring if not one.partition("=")[0].strip() or "=" not in one]:
            raise ValueError(f"{wrong[0]!r} is not NAME=VALUE, as in times=4")
        if taken := [one for one in scoring if one.partition("=")[0] in _OWN]:
            raise ValueError(f"{taken[0]!r} is an option of lcsc itself")
        return scoring

    @field_validator("weights", "blocks")
    @classmethod
    def _free(cls, given: tuple[Any, ...]) -> tuple[Any, ...]:
        if given:
            raise ValueError("lcsc finds the weights itself: give none, neither behind names nor by an option")
        return given


class Lcsc:
    """Search for the combination of a training's saved states that does best on real pictures."""

    name: ClassVar[str] = "lcsc"
    kind: ClassVar[Kind] = Kind.MERGER
    api: ClassVar[int] = API
    summary: ClassVar[str] = "The combination of one training's saved states that scores best on pictures you give."
    paper: ClassVar[str] = (
        "Liu et al., Linear Combination of Saved Checkpoints Makes Consistency and Diffusion Models Better (ICLR 2025)"
    )
    Params: ClassVar[type[Params]] = LcscParams

    def run(self, context: Context, params: LcscParams) -> Result:
        """Write the winner as `sum` does, with a recipe of `sum`; report the search, keep all candidates.

        Raises:
            UsageError: fewer than two states, they do not belong together or cannot paint; too few pictures or
                candidates; or no such evaluator.
            DataError: a file is broken; the message names it, and the tensor.
            PluginError: the evaluator gave a score that is no finite number.
        """
        models, base = _states_of(context.inputs, params)
        judge, wishes = _evaluator(params)
        seed = seed_of(context, params.seed)
        sets = _halves(read_pictures(params.pictures), seed)
        tried, again = _searched(context, models, base, params, judge, wishes, sets, seed)
        winner = min(again, key=lambda candidate: candidate.score)
        trail = {
            "evaluator": judge.name,
            "parameters": wishes.model_dump(mode="json"),
            "seed": seed,
            "states": [model.name for model in models],
            "searched_on": [picture.name for picture in sets[0]],
            "held_back": [picture.name for picture in sets[1]],
            "candidates": [asdict(candidate) for candidate in tried],
            "scored_again": [asdict(candidate) for candidate in again],
        }
        context.path(TRAIL).write_text(json.dumps(trail, indent=1), "utf-8")
        shared = params.model_dump(include=set(MergeParams.model_fields))
        wanted = MergeParams(**{**shared, "weights": winner.coefficients})
        result = merge(context, Method("sum", whole=True), wanted)
        search = _summary(tried, again, winner) | {"evaluator": judge.name, "seed": seed, "pictures": [*map(len, sets)]}
        warnings = list(result.report["warnings"])
        if winner.origin in (SINGLE, AVERAGE):
            warnings.append(
                f"no combination that was found is better than the best {winner.origin} on what was held back"
            )
            context.log(f"warning: {warnings[-1]}")
        more = {"warnings": warnings, "notes": [_told(judge.name, search)], "search": search}
        return replace(result, report={**result.report, **more}, artefacts=(TRAIL,))


def _states_of(inputs: Sequence[InputModel], params: LcscParams) -> tuple[Sequence[InputModel], InputModel | None]:
    models, base = parted(inputs, based=params.base)
    if len(models) < 2:
        raise UsageError(f"lcsc combines the saved states of one training: name two or more, not {len(models)}")
    whole = base is not None or models[0].adapter_type is None
    if whole and (params.rank is not None or params.energy is not None):
        raise UsageError("--rank and --energy shrink an adapter; checkpoints keep their shapes")
    first = len(list(starts(len(models))))
    if params.candidates <= first:
        raise UsageError(
            f"{len(models)} states give {first} candidates to begin with: allow more than {params.candidates}"
        )
    return models, base


def _evaluator(params: LcscParams) -> tuple[Evaluator, Params]:
    plugin = get_plugin(f"{Kind.ANALYZER}.{params.evaluator}")
    judge = plugin()
    if not isinstance(judge, Evaluator):
        raise UsageError(f"analyzer.{params.evaluator} cannot score a model in memory: take denoising-loss or frechet")
    given: dict[str, Any] = {"pictures": params.pictures} if "pictures" in plugin.Params.model_fields else {}
    return judge, check_params(plugin, given | dict(one.split("=", 1) for one in params.scoring))


def _halves(pictures: Sequence[Picture], seed: int) -> tuple[list[Picture], list[Picture]]:
    """Pictures to search with, and others that the best are scored again on."""
    if len(pictures) < _FEWEST:
        raise UsageError(
            f"{len(pictures)} pictures are too few to search with one half and hold the other back: give more"
        )
    order = list(range(len(pictures)))
    Random(seed).shuffle(order)  # noqa: S311  (a reproducible draw, no secret)
    middle = (len(order) + 1) // 2
    return [pictures[place] for place in sorted(order[:middle])], [pictures[place] for place in sorted(order[middle:])]


def _searched(
    context: Context, models: Sequence[InputModel], base: InputModel | None, params: LcscParams, judge: Evaluator,
    wishes: Params, sets: tuple[list[Picture], list[Picture]], seed: int,
) -> tuple[list[Candidate], list[Candidate]]:  # fmt: skip
    """All candidates, and those that were scored again, with these scores."""
    from modelgrove_plugins.evaluate.states import States

    context.progress(0.0, "loading")
    states = States(context, models, base)
    seeds = [(2 * seed + place) << ROOM for place in range(len(sets))]
    measures = [judge.prepare(states.live, half, own, wishes) for half, own in zip(sets, seeds, strict=True)]
    asked = 0

    def scored(measure: Callable[[], float], coefficients: Sequence[float], message: str) -> float:
        nonlocal asked
        context.progress(asked / (params.candidates + _BEST + 2), message)
        asked += 1
        states.set(coefficients)
        score = float(measure())
        if not math.isfinite(score):
            shown = ", ".join(f"{value:.3g}" for value in coefficients)
            raise PluginError(
                f"analyzer.{judge.name} scored {score} for the coefficients {shown}, which is no finite number"
            )
        return score

    def searching(coefficients: Sequence[float]) -> float:
        return scored(measures[0], coefficients, f"candidate {asked + 1} of {params.candidates}")

    evolution = Evolution(len(models), params.candidates, params.population, params.sigma, seed, searching)
    tried = evolution.run()
    again = [
        replace(one, score=scored(measures[1], one.coefficients, "scoring the best again")) for one in _best(tried)
    ]
    return tried, again


def _best(tried: Sequence[Candidate]) -> list[Candidate]:
    """The best five, and the best single state and the best average if they are not among them."""
    ranked = sorted(tried, key=lambda candidate: candidate.score)
    rivals = [next(one for one in ranked if one.origin == origin) for origin in (SINGLE, AVERAGE)]
    return list(dict.fromkeys([*ranked[:_BEST], *rivals]))


def _summary(tried: Sequence[Candidate], again: Sequence[Candidate], winner: Candidate) -> dict[str, Any]:
    """The winner beside the best single state and the best average, on the pictures of the search and on the others."""
    searched = {candidate.coefficients: candidate.score for candidate in tried}

    def told(candidate: Candidate) -> dict[str, Any]:
        return {
            "coefficients": [rounded(value, 4) for value in candidate.coefficients],
            "origin": candidate.origin,
            "generation": candidate.generation,
            "score": rounded(searched[candidate.coefficients], 5),
            "score_held_back": rounded(candidate.score, 5),
        }

    rivals = {
        f"best_{origin}": told(
            min((one for one in again if one.origin == origin), key=lambda one: searched[one.coefficients])
        )
        for origin in (SINGLE, AVERAGE)
    }
    return {"candidates": len(tried), "winner": told(winner), **rivals, "scored_again": [told(one) for one in again]}


def _told(judge: str, search: dict[str, Any]) -> str:
    rivals = (("the winner", "winner"), ("the best average", "best_average"), ("the best state", "best_single"))
    scores = ", ".join(f"{said} {search[name]['score_held_back']:g}" for said, name in rivals)
    return f"{judge} on the pictures that were held back, lower is better: {scores}"
