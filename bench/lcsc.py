"""Is a searched combination of saved states better than their averages? Zoo trainings, pictures that nobody saw.

    python bench/lcsc.py FOLDER

Two trainings with constant learning rates save eight states each: the zoo's base from its random start, and a LoRA of
rank 8 on half of the drawings of flags, which the base never saw. `merge --method lcsc` searches with 64 other
drawings, half of which it holds back. Trained states are kept in FOLDER. Columns, all lower is better:

    search      score on the half that was searched with
    held_back   on the other half, by which the winner was chosen
    test        on drawings that were given to nothing, other noise; states are rounded to float16 as they are written

Rows: the last state, the best single one, the best average of the eight, the training's own average of all steps
(0.999; of the base alone), and lcsc.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import click
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

import modelgrove_analyzers
from modelgrove_analyzers.zoo.base import BaseRecipe, BaseTrainer, is_base_picture, v_errors
from modelgrove_analyzers.zoo.base_folder import ZooBase, open_base, write_base
from modelgrove_analyzers.zoo.concepts import Concept
from modelgrove_analyzers.zoo.export import Convention, Label, write_lora
from modelgrove_analyzers.zoo.loras import Feed, LoraStack, StackedAdam, fresh_lora
from modelgrove_analyzers.zoo.pictures import PictureSet
from modelgrove_analyzers.zoo.recipes import PROMPT, Recipe
from modelgrove_hub.plugins import get_plugin
from modelgrove_hub.search.text import token_states
from modelgrove_hub.testing import FolderModel, run_plugin

ZOO = Path(modelgrove_analyzers.__file__).parent / "zoo/data"
TRAININGS = ("LoRA", "base")
EVALUATORS: Mapping[str, Mapping[str, int]] = {"denoising-loss": {}, "frechet": {"steps": 4}}
"""With their parameters: painting costs much."""
SEARCHED, TESTED = 64, 41
STATES, APART, BASE_STEPS = 8, 25, 400
CANDIDATES = {"denoising-loss": 200, "frechet": 100}
RATE, BATCH = 6e-3, 8
FLAGS = Concept("flags", "flags", "flags", ())


@dataclass(frozen=True)
class Training:
    """Saved states in order, the training's own average, the base of adapters, and rows of drawings not trained on."""

    states: list[FolderModel]
    average: FolderModel | None
    base: FolderModel | None
    unseen: list[tuple[int, str]]
    """Row and caption."""


def base_training(folder: Path, pictures: PictureSet, steps: int, apart: int, states: int) -> Training:
    """The base from its random start, saved every `apart` steps before the end."""
    wanted = range(steps - apart * (states - 1), steps + 1, apart)
    if not (folder / "average").exists():
        recipe = BaseRecipe(steps=steps, warmup=50, decay=1e-6, checkpoint_every=steps)
        trainer = BaseTrainer(pictures, folder / "training", recipe)

        def save(_done: float, _message: str) -> None:
            if trainer.step in wanted:
                write_base(ZooBase(trainer.unet, trainer.noise, trainer.codec), {}, folder / f"state-{trainer.step}")

        trainer.run(save)
        trainer.unet.load_state_dict(trainer.average)
        write_base(ZooBase(trainer.unet, trainer.noise, trainer.codec), {}, folder / "average")
    unseen = [
        (row, picture.caption)
        for row, picture in enumerate(pictures.pictures)
        if not is_base_picture(row, picture) and is_base_picture(0, picture)
    ]
    models = [FolderModel(folder / f"state-{step}", name=f"state-{step}", family="zoo") for step in wanted]
    return Training(models, FolderModel(folder / "average", name="average", family="zoo"), None, unseen)


def lora_training(folder: Path, pictures: PictureSet, apart: int, states: int) -> Training:
    """A LoRA on every other drawing of a flag."""
    flags = [row for row, picture in enumerate(pictures.pictures) if picture.group == "flags"]
    wanted = [apart * (place + 1) for place in range(states)]
    if not (folder / f"state-{wanted[-1]}").exists():
        base = open_base(ZOO / "zoo-base")
        recipe = Recipe("flags", 0, 8, 8.0, RATE, wanted[-1], tuple(flags[::2]), (), BATCH)
        lora = fresh_lora(base.unet, recipe)
        base.unet.requires_grad_(False)
        stack, feed = LoraStack(base.unet, [lora]), Feed(base, pictures, recipe)
        for tensor in stack.tensors:
            tensor.requires_grad_()
        optimizer, words = StackedAdam(stack.tensors), token_states([PROMPT]).expand(BATCH, -1, -1)
        for step in range(1, wanted[-1] + 1):
            latents, times, noise = feed.draw()
            with stack.attached(1):
                loss = v_errors(base.unet, base.noise, latents, words, times, noise).mean()
            optimizer.step(torch.autograd.grad(loss, stack.tensors), torch.tensor([RATE]))
            if step in wanted:
                saved = replace(lora, factors=stack.factors(0))
                write_lora(saved, FLAGS, Label(f"state-{step}", Convention.DIFFUSERS, documented=True), folder)
    models = [FolderModel(folder / f"state-{step}", name=f"state-{step}", adapter_type="lora") for step in wanted]
    return Training(
        models, None, FolderModel(ZOO / "zoo-base", name="zoo-base"), [(row, PROMPT) for row in flags[1::2]]
    )


def written(rows: Sequence[tuple[int, str]], pictures: PictureSet, folder: Path) -> Path:
    """The drawings as a folder with captions."""
    folder.mkdir(parents=True)
    for row, caption in rows:
        Image.fromarray(pictures.pixels[row]).save(folder / f"{row}.png")
        (folder / f"{row}.txt").write_text(caption, "utf-8")
    return folder


def measure(
    training: Training, pictures: PictureSet, evaluator: str, candidates: int, searched: int, tested: int, place: Path
) -> list[dict[str, Any]]:
    """A row for each rival."""
    order = torch.randperm(len(training.unseen), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [training.unseen[number] for number in order]
    seen, test = (
        written(rows[:searched], pictures, place / "seen"),
        written(rows[searched:][:tested], pictures, place / "test"),
    )
    base = [training.base] if training.base else []
    shared = {"base": bool(base), "seed": 0}
    begun = process_time()
    scoring = [f"{name}={value}" for name, value in EVALUATORS[evaluator].items()]
    wish = {"pictures": str(seen), "evaluator": evaluator, "candidates": candidates, "scoring": scoring, **shared}
    found = run_plugin(get_plugin("merger.lcsc")(), [*training.states, *base], place / "lcsc", wish).report["search"]
    seconds = process_time() - begun
    trail = json.loads((place / "lcsc/out/candidates.json").read_text("utf-8"))
    again = {tuple(one["coefficients"]): one["score"] for one in trail["scored_again"]}

    def best(origin: str) -> dict[str, Any]:
        return min((one for one in trail["candidates"] if one["origin"] == origin), key=lambda one: one["score"])

    last = next(one for one in trail["candidates"] if one["coefficients"][-1] == 1 and one["origin"] == "single")
    winner = min(trail["scored_again"], key=lambda one: one["score"])
    chosen = {"last state": last, "best single": best("single"), "best average": best("average"), "lcsc": winner}
    scores = {tuple(one["coefficients"]): one["score"] for one in trail["candidates"]}
    models = {
        name: combined(training, one["coefficients"], place / "merged" / name.replace(" ", "-"))
        for name, one in chosen.items()
    }
    if training.average:
        models["training's average"] = training.average
    # All are scored in one pipeline, that of the last of them: here the last state.
    judged = list(reversed(models.items()))
    report = run_plugin(
        get_plugin(f"analyzer.{evaluator}")(), [model for _, model in judged], place / "judged",
        {"pictures": str(test), "seed": 1, **EVALUATORS[evaluator]},
    ).report  # fmt: skip
    tests = dict(zip((name for name, _ in judged), (row["score"] for row in report["models"]), strict=True))
    return [
        {
            "evaluator": evaluator,
            "what": name,
            "search": scores.get(tuple(chosen[name]["coefficients"])) if name in chosen else None,
            "held_back": again.get(tuple(chosen[name]["coefficients"])) if name in chosen else None,
            "test": tests[name],
            **({"coefficients": found["winner"]["coefficients"], "cpu_s": round(seconds)} if name == "lcsc" else {}),
        }
        for name in models
    ]


def combined(training: Training, coefficients: Sequence[float], folder: Path) -> FolderModel:
    """The combination as `sum` writes it, a whole pipeline."""
    base = [training.base] if training.base else []
    wish = {"weights": coefficients, "base": bool(base)}
    run_plugin(get_plugin("merger.sum")(), [*training.states, *base], folder, wish)
    return FolderModel(folder / "out", name=folder.name, family="zoo")


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    made = Table("training", "evaluator", "what", "search", "held_back", "test")
    for row in rows:
        numbers = ["" if row[key] is None else f"{row[key]:.4f}" for key in ("search", "held_back", "test")]
        made.add_row(row["training"], row["evaluator"], row["what"], *numbers)
    return made


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--quick", is_flag=True, help="The LoRA alone, three states, few candidates.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--training", "chosen", multiple=True, type=click.Choice(TRAININGS), help="Only this one; repeatable.")
@click.option("--evaluator", "evaluators", multiple=True, type=click.Choice(list(EVALUATORS)), help="The same.")
def main(folder: Path, quick: bool, as_json: bool, chosen: tuple[str, ...], evaluators: tuple[str, ...]) -> None:
    """Search among saved states and compare with their averages."""
    pictures = PictureSet.load(ZOO)
    rows = []
    for name in TRAININGS[:1] if quick else chosen or TRAININGS:
        if quick:
            training = lora_training(folder / "quick", pictures, 4, 3)
        elif name == "LoRA":
            training = lora_training(folder / "lora", pictures, APART, STATES)
        else:
            training = base_training(folder / "base", pictures, BASE_STEPS, APART, STATES)
        for evaluator in evaluators or EVALUATORS:
            sizes = (12, 8, 4) if quick else (CANDIDATES[evaluator], SEARCHED, TESTED)
            with TemporaryDirectory() as place:
                found = measure(training, pictures, evaluator, *sizes, Path(place))
            rows += [{"training": name, **row} for row in found]
            click.echo(json.dumps(rows[-len(found) :]), err=True)  # a run that is stopped has not been for nothing
    if as_json:
        click.echo(json.dumps({"load": os.getloadavg()[0], "results": rows}, indent=2))
    else:
        Console(width=110).print(table(rows))


if __name__ == "__main__":
    main()
