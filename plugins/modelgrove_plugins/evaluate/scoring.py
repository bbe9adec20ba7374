"""What all evaluators share: where the pictures are, and the report on models one by one."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from modelgrove_hub.contracts import Context, Evaluator, Params, Result
from modelgrove_hub.errors import UsageError
from modelgrove_plugins.evaluate.pictures import read_pictures
from modelgrove_plugins.merge.interference import rounded
from modelgrove_plugins.merge.merging import parted

PICTURES = "Folder of real pictures that were not trained on; beside NAME.png its caption in NAME.txt."
ROOM = 20
"""Evaluators count up from their seed; this many bits are theirs."""
_SEEDS = 2**41
"""Seeds are below: two times one and that room fit into 64 bits with a sign."""


class ScoringParams(Params):
    """Pictures, and the seed of noise."""

    pictures: Path = Field(description=PICTURES)
    base: bool = Field(False, description="The last input is the base of the adapters, instead of the registered one.")
    seed: int | None = Field(None, ge=0, description="Of all noise; the job's if not given.")

    @field_validator("pictures")
    @classmethod
    def _absolute(cls, pictures: Path) -> Path:
        return absolute(pictures)


def absolute(folder: Path) -> Path:
    """The folder, also for a worker, which has another working directory."""
    return folder.expanduser().absolute()


def seed_of(context: Context, wanted: int | None) -> int:
    """The job's seed, or the one that is wanted, small enough to count up from."""
    return (context.seed if wanted is None else wanted) % _SEEDS


def score_models(context: Context, evaluator: Evaluator, params: ScoringParams) -> Result:
    """The score of every input, checkpoints of one architecture or adapters of one base, on the same pictures.

    Raises:
        UsageError: the inputs do not belong together or cannot paint.
        DataError: a model or a picture is broken.
    """
    from modelgrove_plugins.evaluate.states import States

    models, base = parted(context.inputs, based=params.base)
    if not models:
        raise UsageError("there is nothing to score: name one model or more")
    pictures = read_pictures(params.pictures)
    context.progress(0.0, "loading")
    states = States(context, models, base)
    seed = seed_of(context, params.seed)
    score = evaluator.prepare(states.live, pictures, seed << ROOM, params)
    rows = []
    for place, model in enumerate(models):
        context.progress(place / len(models), f"scoring {model.name}")
        states.set([float(place == other) for other in range(len(models))])
        rows.append({"name": model.name, "score": rounded(score(), 6)})
    return Result(report={"evaluator": evaluator.name, "pictures": len(pictures), "seed": seed, "models": rows})
