"""Grow a population: train its models in batches, write them and the truth about them; go on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from modelgrove_analyzers.zoo.base import Progress
from modelgrove_analyzers.zoo.base_folder import ZooBase
from modelgrove_analyzers.zoo.export import Convention, read_factors, write_lora
from modelgrove_analyzers.zoo.loras import Lora, target_modules, train_loras
from modelgrove_analyzers.zoo.pictures import PictureSet
from modelgrove_analyzers.zoo.populations import Member, Population
from modelgrove_analyzers.zoo.recipes import Method, Recipe
from modelgrove_analyzers.zoo.sara import Sara, train_sara
from modelgrove_hub.errors import NotFoundError, UsageError
from modelgrove_hub.formats.shared_basis import BasisColumns

TRUTH = "truth.jsonl"
TOGETHER = 32
"""LoRAs trained in one batch: more are no faster, and take more memory."""


def grow(
    population: Population,
    base: ZooBase,
    pictures: PictureSet,
    out_folder: Path,
    progress: Progress = lambda _done, _message: None,
) -> list[dict[str, Any]]:
    """Write the population's models to `out_folder` and what is true of each to `truth.jsonl`; returns the truth.

    Models that are already there are left alone, so a run that was killed goes on.
    """
    members = population.members(pictures)
    truth = {name: row for name, row in read_truth(out_folder).items() if (out_folder / row["path"]).exists()}
    # Equal numbers of steps go together, so that few finished LoRAs wait for others.
    waiting = sorted((m for m in members if m.label.name not in truth), key=lambda m: -m.recipe.steps)
    size = 1 if population.nuisance.method is Method.SARA else TOGETHER
    batches = [waiting[i : i + size] for i in range(0, len(waiting), size)]
    for number, batch in enumerate(batches):
        told = partial(_part_of, progress, number, len(batches))
        loras = _train(base, pictures, [member.recipe for member in batch], told)
        for member, lora in zip(batch, loras, strict=True):
            truth[member.label.name] = _write(member, lora, out_folder)
        write_truth(out_folder, [truth[m.label.name] for m in members if m.label.name in truth])
    return [truth[m.label.name] for m in members if m.label.name in truth]


def _train(base: ZooBase, pictures: PictureSet, recipes: Sequence[Recipe], progress: Progress) -> Sequence[Lora | Sara]:
    if recipes[0].method is Method.SARA:
        return [train_sara(base, pictures, recipe, progress=progress) for recipe in recipes]
    return train_loras(base, pictures, recipes, progress)


def _part_of(progress: Progress, number: int, count: int, done: float, message: str) -> None:
    progress((number + done) / count, f"batch {number + 1} of {count}: {message}")


def read_truth(folder: Path) -> dict[str, dict[str, Any]]:
    """The truth about a grown population, by model name; empty when there is none yet."""
    path = folder / TRUTH
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def read_loras(folder: Path, base: ZooBase, limit: int) -> list[Lora]:
    """Up to `limit` grown LoRAs, spread evenly over the population, as they are on disk (float16).

    Raises:
        NotFoundError: nothing was grown in `folder`.
        UsageError: what was grown there are sparse adapters.
    """
    rows = list(read_truth(folder).values())
    if not rows:
        raise NotFoundError(f"{folder}: no {TRUTH} with models in it; `modelgrove zoo grow {folder}` makes some")
    modules = target_modules(base.unet)
    loras = []
    for row in rows[:: max(1, len(rows) // limit)][:limit]:
        recipe = _read_recipe(row["recipe"])
        if recipe.method is Method.SARA:
            raise UsageError(f"{folder / row['path']} has no factors to read; `modelgrove preview` paints with it")
        factors = read_factors(folder / row["path"], modules, Convention(row["convention"]), recipe.method)
        loras.append(Lora(recipe, factors, row["first_loss"], row["last_loss"]))
    return loras


def _read_recipe(fields: dict[str, Any]) -> Recipe:
    read: dict[str, Any] = {"pictures": tuple(fields["pictures"]), "artists": tuple(fields["artists"])}
    columns = fields.get("columns")
    read["columns"] = BasisColumns(**columns) if columns else None
    return Recipe(**{**fields, **read, "method": Method(fields.get("method", Method.LORA))})


def _write(member: Member, lora: Lora | Sara, folder: Path) -> dict[str, Any]:
    concept = member.concept
    path = write_lora(lora, concept, member.label, folder)
    return {
        "name": member.label.name,
        "path": path.relative_to(folder).as_posix(),
        "concept": concept.name,
        "text": concept.text,
        "group": concept.group,
        "held_out": concept.held_out,
        "documented": member.label.documented,
        "convention": member.label.convention.value,
        "first_loss": round(lora.first_loss, 4),
        "last_loss": round(lora.last_loss, 4),
        "recipe": asdict(member.recipe),
    }


def write_truth(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write `rows` as the folder's truth, all or nothing."""
    unfinished = folder / f"{TRUTH}.partial"
    unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    os.replace(unfinished, folder / TRUTH)
