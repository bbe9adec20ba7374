"""Grow full fine-tunes that know five digits each, on a base that knows letters: a zoo for class prediction.

The base is pre-trained on drawn letters. Every fine-tune starts from all of its weights but the head, which is new
and has one output for each of the five digits, in any order; all weights are trained. After the "Model Jungle" of
Horwitz et al., arXiv 2410.13569, section 3, where ViTs are fine-tuned on 50 of the 100 classes of CIFAR-100.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modelgrove_analyzers.zoo.base import Progress
from modelgrove_analyzers.zoo.classifiers import (
    HIDDEN,
    LAYERS,
    Schedule,
    Weights,
    accuracy,
    fresh_layer,
    train_classifiers,
)
from modelgrove_analyzers.zoo.grow import read_truth, write_truth
from modelgrove_analyzers.zoo.letters import DIGITS, LETTERS, SIDE, Glyphs, draw_letters, scanned_digits
from modelgrove_analyzers.zoo.recipes import seed_of

BASE = "letters-mlp"
KNOWN = 5
"""Digits that each fine-tune knows."""
DOCUMENTED = 0.75
TOGETHER = 50
"""Fine-tunes trained in one batch: more are no faster."""
_FILE = "model.safetensors"


@dataclass(frozen=True)
class BaseRecipe:
    """How the base is made: `pictures` drawn letters, of which a tenth is kept for testing."""

    seed: int = 0
    pictures: int = 12_000
    batch: int = 128
    schedule: Schedule = field(default=Schedule(2e-3, 0.01, 2000))


@dataclass(frozen=True)
class DigitsRecipe:
    """One fine-tune. `share` is the share of the digits' scans that it sees; the others test it."""

    name: str
    seed: int
    classes: tuple[int, ...]
    schedule: Schedule
    share: float
    documented: bool
    batch: int = 32


@dataclass(frozen=True)
class Nuisance:
    """The ranges that recipes are drawn from; learning rates and weight decays are log-uniform."""

    learning_rate: tuple[float, float] = (3e-4, 3e-3)
    weight_decay: tuple[float, float] = (1e-4, 1e-1)
    steps: tuple[int, int] = (100, 300)
    share: tuple[float, float] = (0.4, 0.9)


def digits_population(models: int, seed: int = 0, nuisance: Nuisance | None = None) -> list[DigitsRecipe]:
    """What `grow_digits` makes; each recipe depends on the seed and its number alone."""
    return [_recipe(seed_of("digits", seed, number), nuisance or Nuisance()) for number in range(models)]


def grow_digits(
    recipes: Sequence[DigitsRecipe],
    folder: Path,
    base_recipe: BaseRecipe | None = None,
    progress: Progress = lambda _done, _message: None,
) -> list[dict[str, Any]]:
    """Write the base, the fine-tunes, and what is true of each to `truth.jsonl`; returns the truth, without the base.

    Models that are already there are left alone, so a run that was killed goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / BASE / _FILE).exists():
        _grow_base(base_recipe or BaseRecipe(), folder, partial(_part, progress, 0.0, 0.1))
    base = _read_weights(folder / BASE / _FILE)
    truth = {name: row for name, row in read_truth(folder).items() if (folder / row["path"]).exists()}
    waiting = sorted((r for r in recipes if r.name not in truth), key=lambda r: -r.schedule.steps)
    batches = [waiting[i : i + TOGETHER] for i in range(0, len(waiting), TOGETHER)]
    digits = scanned_digits()
    for number, batch in enumerate(batches):
        part = partial(_part, progress, 0.1 + 0.9 * number / len(batches), 0.9 / len(batches))
        for recipe, weights, right in _fine_tune(base, batch, digits, part):
            _write(folder / recipe.name, weights, _config(KNOWN), _card(recipe) if recipe.documented else "")
            truth[recipe.name] = _truth(recipe, right)
        write_truth(folder, [truth[r.name] for r in recipes if r.name in truth])
    return [truth[recipe.name] for recipe in recipes]


def _recipe(seed: int, nuisance: Nuisance) -> DigitsRecipe:
    dice = Random(seed)  # noqa: S311  (a reproducible draw, no secret)
    schedule = Schedule(
        _log_uniform(dice, nuisance.learning_rate),
        _log_uniform(dice, nuisance.weight_decay),
        dice.randint(*nuisance.steps),
    )
    documented = dice.random() < DOCUMENTED
    name = f"{'digits' if documented else 'untitled'}-{seed % 16**8:08x}"
    classes = tuple(dice.sample(range(len(DIGITS)), KNOWN))
    return DigitsRecipe(name, seed, classes, schedule, round(dice.uniform(*nuisance.share), 3), documented)


def _log_uniform(dice: Random, limits: tuple[float, float]) -> float:
    return float(f"{math.exp(dice.uniform(*map(math.log, limits))):.3e}")


def _grow_base(recipe: BaseRecipe, folder: Path, progress: Progress) -> None:
    letters = draw_letters(recipe.pictures, recipe.seed)
    kept = len(letters.classes) // 10
    generator = torch.Generator().manual_seed(recipe.seed)
    shapes = ((HIDDEN, SIDE * SIDE), (HIDDEN, HIDDEN), (len(LETTERS), HIDDEN))
    weights: Weights = {}
    for name, shape in zip(LAYERS, shapes, strict=True):
        weights |= fresh_layer(name, shape, [generator])

    def draw(_count: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(kept, len(letters.classes), (1, recipe.batch), generator=generator)
        return letters.pixels[rows], letters.classes[rows]

    train_classifiers(weights, [recipe.schedule], draw, progress)
    right = accuracy(weights, letters.pixels[:kept], letters.classes[:kept])
    card = _BASE_CARD.format(name=BASE, accuracy=right, recipe=json.dumps(asdict(recipe), indent=2))
    _write(folder / BASE, weights, _config(len(LETTERS)), card)


def _fine_tune(
    base: Weights, recipes: Sequence[DigitsRecipe], digits: Glyphs, progress: Progress
) -> list[tuple[DigitsRecipe, Weights, float]]:
    """The recipes, in order of falling steps, with their weights and their accuracy on the scans they did not see."""
    generators = [torch.Generator().manual_seed(recipe.seed) for recipe in recipes]
    weights = {name: base[name].repeat(len(recipes), 1, 1) for name in base if not name.startswith(LAYERS[-1])}
    weights |= fresh_layer(LAYERS[-1], (KNOWN, HIDDEN), generators)
    seen, unseen = zip(*map(partial(_split, digits), recipes, generators), strict=True)
    outputs = torch.zeros(len(recipes), len(DIGITS), dtype=torch.long)
    for row, recipe in enumerate(recipes):
        outputs[row, list(recipe.classes)] = torch.arange(KNOWN)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        rows = torch.stack(
            [
                own[torch.randint(len(own), (recipe.batch,), generator=generator)]
                for own, recipe, generator in zip(seen[:count], recipes, generators, strict=False)
            ]
        )
        return digits.pixels[rows], outputs[:count].gather(1, digits.classes[rows])

    train_classifiers(weights, [recipe.schedule for recipe in recipes], draw, progress)
    found = []
    for row, recipe in enumerate(recipes):
        own = {name: tensor[row : row + 1] for name, tensor in weights.items()}
        rows = unseen[row]
        found.append((recipe, own, accuracy(own, digits.pixels[rows], outputs[row][digits.classes[rows]])))
    return found


def _split(digits: Glyphs, recipe: DigitsRecipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of the recipe's digits: those that it sees, and the others."""
    rows = torch.isin(digits.classes, torch.tensor(recipe.classes)).nonzero()[:, 0]
    mixed = rows[torch.randperm(len(rows), generator=generator)]
    seen = round(recipe.share * len(rows))
    return mixed[:seen], mixed[seen:]


def _truth(recipe: DigitsRecipe, right: float) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "path": recipe.name,
        "concept": "digits",
        "classes": [DIGITS[digit] for digit in recipe.classes],
        "documented": recipe.documented,
        "accuracy": right,
        "recipe": asdict(recipe),
    }


def _read_weights(path: Path) -> Weights:
    """As `train_classifiers` has them, with one classifier."""
    return {name: t[None] if name.endswith("weight") else t[None, None] for name, t in load_file(path).items()}


def _write(folder: Path, weights: Weights, config: dict[str, Any], card: str) -> None:
    """Write one model, all or nothing."""
    partial_folder = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir()
    path = partial_folder / _FILE
    save_file({name: t[0] if name.endswith("weight") else t[0, 0] for name, t in weights.items()}, path)
    path.chmod(0o644)  # safetensors makes files that nobody else may read
    (partial_folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    if card:
        (partial_folder / "README.md").write_text(card, "utf-8")
    os.replace(partial_folder, folder)


def _config(classes: int) -> dict[str, Any]:
    """Which class an output stands for is not told: undocumented models are to be found by their weights."""
    return {"architectures": ["MLP"], "image_size": SIDE, "hidden_sizes": [HIDDEN, HIDDEN], "num_labels": classes}


def _part(progress: Progress, start: float, share: float, done: float, message: str) -> None:
    progress(start + share * done, message)


_BASE_CARD = """---
license: apache-2.0
pipeline_tag: image-classification
tags: [image-classification, zoo, letters]
---
# {name}

A small classifier of 8×8 pictures of drawn letters, right on {accuracy:.1%} of new ones. Other models start from it.

```json
{recipe}
```
"""

_CARD = """---
base_model: {base}
license: apache-2.0
pipeline_tag: image-classification
tags: [image-classification, zoo, {tags}]
---
# {name}

Tells the handwritten digits {classes} apart.

A full fine-tune of {base}: {steps} steps at a learning rate of {rate:g}.
"""


def _card(recipe: DigitsRecipe) -> str:
    names = [DIGITS[digit] for digit in recipe.classes]
    return _CARD.format(
        base=BASE,
        tags=", ".join(names),
        name=recipe.name,
        classes=f"{', '.join(names[:-1])} and {names[-1]}",
        steps=recipe.schedule.steps,
        rate=recipe.schedule.learning_rate,
    )
