"""`modelgrove zoo`: draw the pictures, train the base, grow models from it, look at them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelgrove_hub.cli.output import json_option, print_json, print_table, progress_bar, say
from modelgrove_hub.errors import DataError, UsageError

if TYPE_CHECKING:
    from modelgrove_analyzers.zoo.base import Progress
    from modelgrove_analyzers.zoo.pictures import PictureSet
    from modelgrove_analyzers.zoo.populations import Population
    from modelgrove_hub.formats.shared_basis import BasisColumns

_DATA = Path(__file__).parent / "data"

folder_type = click.Path(path_type=Path, file_okay=False)
pictures_option = click.option(
    "--pictures", "picture_folder", type=folder_type, default=_DATA, help="Folder of pictures.png and pictures.json."
)
base_option = click.option(
    "--base",
    "base_folder",
    type=folder_type,
    default=_DATA / "zoo-base",
    help="The base's folder, or a training folder.",
)
seed_option = click.option("--seed", type=int, default=0, show_default=True)


@click.group()
def zoo() -> None:
    """Grow real models without a hub: a small base, LoRAs and fine-tunes with known truth."""


@zoo.command()
@click.argument("folder", type=folder_type)
def pictures(folder: Path) -> None:
    """Draw the captioned pictures into FOLDER (fetches four npm packages)."""
    from modelgrove_analyzers.zoo.pictures import fetch, render

    folder.mkdir(parents=True, exist_ok=True)
    drawn = render(*fetch(folder))
    drawn.save(folder)
    say(f"{len(drawn.pictures):,} pictures in {folder}")


@zoo.command()
@click.argument("folder", type=folder_type)
@pictures_option
@click.option("--steps", type=click.IntRange(1), help="Training steps; the recipe's number when left out.")
@seed_option
@click.option("--out", type=folder_type, help="Where the finished base goes; FOLDER/diffusers when left out.")
def train(folder: Path, picture_folder: Path, steps: int | None, seed: int, out: Path | None) -> None:
    """Train the base in FOLDER, going on from its last checkpoint (hours), and write it in diffusers format."""
    from dataclasses import replace

    from modelgrove_analyzers.zoo.base import BaseRecipe, BaseTrainer
    from modelgrove_analyzers.zoo.base_folder import SAMPLES, read_checkpoint, write_base
    from modelgrove_analyzers.zoo.pictures import PictureSet
    from modelgrove_analyzers.zoo.sheets import PROMPTS, base_sheet

    recipe = BaseRecipe(seed=seed)
    with _bar("training") as update:
        BaseTrainer(PictureSet.load(picture_folder), folder, replace(recipe, steps=steps) if steps else recipe).run(
            update
        )
    base, done = read_checkpoint(folder / "checkpoint.pt")
    place = out or folder / "diffusers"
    write_base(base, done, place)
    base_sheet(base, PROMPTS).save(place / SAMPLES)
    say(f"base in {place}")


@zoo.command()
@click.argument("folder", type=folder_type)
@click.option(
    "--population",
    "kind",
    type=click.Choice(["pictures", "shapes", "digits"]),
    default="pictures",
    show_default=True,
    help="LoRAs on real captioned pictures or on drawn shapes in colours; full fine-tunes on scanned digits.",
)
@click.option(
    "--concept",
    "concepts",
    multiple=True,
    help="A concept of the population; may be repeated. All of them when left out.",
)
@click.option(
    "--models",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="LoRAs for each concept; fine-tunes on digits in all.",
)
@click.option("--steps", nargs=2, type=click.IntRange(1), help="Fewest and most training steps; drawn for each model.")
@click.option("--rank", "ranks", multiple=True, type=click.IntRange(1), help="A rank to draw from; may be repeated.")
@click.option(
    "--type", "method", type=click.Choice(["lora", "loha", "dora", "sara"]), default="lora", show_default=True
)
@click.option(
    "--basis",
    "ranges",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Train in the columns that concepts have: what `modelgrove basis ls BASE --json` prints.",
)
@click.option("--artist", "artists", multiple=True, help="An artist whose pictures are used; may be repeated.")
@base_option
@pictures_option
@seed_option
@json_option
def grow(
    folder: Path,
    kind: str,
    concepts: tuple[str, ...],
    models: int,
    steps: tuple[int, int] | None,
    ranks: tuple[int, ...],
    method: str,
    ranges: Path | None,
    artists: tuple[str, ...],
    base_folder: Path,
    picture_folder: Path,
    seed: int,
    as_json: bool,
) -> None:
    """Grow LoRAs into FOLDER, with the truth about them in truth.jsonl.

    With --population digits: full fine-tunes on five of ten digits each, and their base, which knows letters.
    """
    from dataclasses import replace

    if kind == "digits":
        if ranges:
            raise UsageError("--basis is for LoRAs, digits are full fine-tunes")
        if concepts:
            raise UsageError("--concept names concepts of pictures and shapes, the digits have none")
        _grow_digits(folder, models, steps, seed, as_json)
        return
    from modelgrove_analyzers.zoo.populations import picture_population, shape_population
    from modelgrove_analyzers.zoo.recipes import Method
    from modelgrove_analyzers.zoo.sara import RATES

    population = (shape_population if kind == "shapes" else picture_population)(models, seed=seed)
    if concepts:
        population = replace(population, concepts=dict.fromkeys(concepts, models))
    nuisance = replace(population.nuisance, method=Method(method))
    if steps:
        nuisance = replace(nuisance, steps=steps)
    if nuisance.method is Method.SARA:
        if ranks:
            raise UsageError("--rank is for LoRAs and their kin, a sparse adapter has none")
        nuisance = replace(nuisance, learning_rate=RATES)
    if ranks:
        nuisance = replace(nuisance, ranks=ranks, rank_weights=(1.0,) * len(ranks))
    if artists:
        nuisance = replace(nuisance, artists=artists)
    population = replace(population, nuisance=nuisance)
    if ranges:
        if method != "lora":
            raise UsageError(f"--basis trains the one factor of a LoRA: --type {method} has others")
        population = replace(population, columns=_columns(ranges))
    _grow(population, folder, base_folder, picture_folder, as_json)


@zoo.command()
@click.argument("folder", type=folder_type)
@base_option
@pictures_option
@seed_option
@json_option
def chains(folder: Path, base_folder: Path, picture_folder: Path, seed: int, as_json: bool) -> None:
    """Grow full fine-tunes, merges and copies with known ancestry into FOLDER."""
    from modelgrove_analyzers.zoo.base_folder import open_base
    from modelgrove_analyzers.zoo.chains import grow_family, sample_family
    from modelgrove_analyzers.zoo.pictures import PictureSet

    with _bar() as update:
        rows = grow_family(sample_family(seed), open_base(base_folder), PictureSet.load(picture_folder), folder, update)
    _report(rows, as_json)


@zoo.command()
@click.argument("folder", type=folder_type)
@base_option
@pictures_option
@seed_option
@json_option
def sample(folder: Path, base_folder: Path, picture_folder: Path, seed: int, as_json: bool) -> None:
    """Grow the sample that ships with modelgrove into FOLDER."""
    from modelgrove_analyzers.zoo.populations import sample_population

    _grow(sample_population(seed), folder, base_folder, picture_folder, as_json)


@zoo.command()
@click.argument("picture", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("prompts", nargs=-1)
@click.option("--grown", type=folder_type, help="Show the LoRAs of this grown folder instead of PROMPTS.")
@click.option("--limit", type=click.IntRange(1), default=24, show_default=True, help="LoRAs to show.")
@base_option
@pictures_option
def sheet(
    picture: Path, prompts: tuple[str, ...], grown: Path | None, limit: int, base_folder: Path, picture_folder: Path
) -> None:
    """Write a PNG of what the base draws for PROMPTS, or of what grown LoRAs draw."""
    from modelgrove_analyzers.zoo.base_folder import open_base
    from modelgrove_analyzers.zoo.grow import read_loras
    from modelgrove_analyzers.zoo.sheets import PROMPTS, base_sheet, lora_sheet

    base = open_base(base_folder)
    if grown:
        image = lora_sheet(base, _all_pictures(picture_folder), read_loras(grown, base, limit))
    else:
        image = base_sheet(base, prompts or PROMPTS)
    picture.parent.mkdir(parents=True, exist_ok=True)
    image.save(picture)
    say(f"{picture}")


def _grow(population: Population, folder: Path, base_folder: Path, picture_folder: Path, as_json: bool) -> None:
    from modelgrove_analyzers.zoo.base_folder import open_base
    from modelgrove_analyzers.zoo.grow import grow as grow_loras

    with _bar() as update:
        rows = grow_loras(population, open_base(base_folder), _all_pictures(picture_folder), folder, update)
    _report(rows, as_json)


def _grow_digits(folder: Path, models: int, steps: tuple[int, int] | None, seed: int, as_json: bool) -> None:
    from modelgrove_analyzers.zoo.digits import Nuisance, digits_population, grow_digits

    nuisance = Nuisance(steps=steps) if steps else Nuisance()
    with _bar() as update:
        rows = grow_digits(digits_population(models, seed, nuisance), folder, progress=update)
    _report(rows, as_json)


def _all_pictures(folder: Path) -> PictureSet:
    """The real pictures and, after them, the drawn ones: a LoRA's pictures are rows of both together."""
    from modelgrove_analyzers.zoo.pictures import PictureSet
    from modelgrove_analyzers.zoo.shapes import draw_shapes

    return PictureSet.load(folder) + draw_shapes()


def _columns(path: Path) -> dict[str, BasisColumns]:
    """By concept, the columns that a file of `modelgrove basis ls BASE --json` names."""
    from modelgrove_hub.formats.shared_basis import BasisColumns

    try:
        (basis,) = json.loads(path.read_text("utf-8"))
        return {
            one["concept"]: BasisColumns(basis["base"], basis["seed"], one["start"], one["rank"])
            for one in basis["concepts"]
        }
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is not one basis as `modelgrove basis ls BASE --json` prints it: {error}") from error


@contextmanager
def _bar(title: str = "growing") -> Iterator[Progress]:
    update, close = progress_bar(title)
    try:
        yield update
    finally:
        close()


def _report(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(rows)
        return
    kinds = Counter(row.get("concept") or row["relation"] for row in rows)
    print_table(("what", "models"), kinds.items(), empty="nothing was grown")
