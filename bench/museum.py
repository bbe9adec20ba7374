"""Does a shared LoRA forget its styles? Three styles in sequence on the zoo's base: `python bench/museum.py`.

The styles are the zoo's drawings made over: `outline` (dark edges on paper), `night` (inverted, bluish) and `mosaic`
(tiles of four pixels, few colours). `merge --method museum` learns them one after the other from 24 drawings each, with
their captions. After each, every style learned so far is asked on 16 other drawings in that style under its token.
Columns, lower is better but for `cosine`:

    after      the style learned last
    outline …  ‖v̂ − v‖² / ‖v‖² of a style's held-out drawings under its token, at eight fixed times, fixed noise
    forgotten  mean over the earlier styles of that error less what it was just after they were learned
    base       the same three columns of the base without LoRA, under no token

Rows: no regularisers, the weight term alone, the feature term alone, both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from rich.console import Console
from rich.table import Table

import modelgrove_analyzers
from modelgrove_analyzers.zoo.base import is_base_picture
from modelgrove_analyzers.zoo.pictures import PictureSet
from modelgrove_hub.contracts import Picture
from modelgrove_hub.formats.style_tokens import place_rows, read_museum
from modelgrove_hub.formats.updates import open_updates
from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_plugins.evaluate.live import Live
from modelgrove_plugins.merge.museum import MuseumMaker
from modelgrove_plugins.preview.diffusers import open_painter
from modelgrove_plugins.preview.fusing import fuse

ZOO = Path(modelgrove_analyzers.__file__).parent / "zoo/data"
LEARNED, TESTED, TIMES = 24, 16, 8
RATES = {"learning_rate": 4e-3, "token_rate": 0.03}
"""Higher than the defaults: the zoo's LoRAs are trained in few steps."""
VARIANTS: Mapping[str, Mapping[str, float]] = {
    "none": {"features": 0, "direction": 0},
    "weight": {"features": 0},
    "feature": {"direction": 0},
    "both": {},
}


def outline(picture: Image.Image) -> Image.Image:
    edges = picture.convert("L").filter(ImageFilter.FIND_EDGES).crop((1, 1, 31, 31)).resize((32, 32))
    return ImageOps.colorize(edges.point(lambda value: min(255, 3 * value)), "antiquewhite", "black")


def night(picture: Image.Image) -> Image.Image:
    return ImageOps.colorize(ImageOps.invert(picture.convert("L")), "midnightblue", "gold")


def mosaic(picture: Image.Image) -> Image.Image:
    return ImageOps.posterize(
        picture.resize((8, 8), Image.Resampling.BOX).resize((32, 32), Image.Resampling.NEAREST), 2
    )


STYLES: Mapping[str, Callable[[Image.Image], Image.Image]] = {"outline": outline, "night": night, "mosaic": mosaic}


def drawings(count: int) -> list[tuple[NDArray[np.uint8], str]]:
    """Pixels and captions of drawings that the base was trained on, drawn at random, the same each time."""
    pictures = PictureSet.load(ZOO)
    known = [row for row, picture in enumerate(pictures.pictures) if is_base_picture(row, picture)]
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return [(pictures.pixels[known[place]], pictures.pictures[known[place]].label) for place in order]


def errors(base: FolderModel, version: FolderModel | None, held: Mapping[str, list[Picture]]) -> dict[str, float]:
    """By style, the error under its token with the version's LoRA; under no token without a version."""
    with TemporaryDirectory() as folder:
        painter = open_painter(base, Path(folder))
    rows: Mapping[str, torch.Tensor] = {}
    if version is not None:
        fuse(painter.networks, open_updates(version), 1.0)
        read = read_museum(version)
        rows = read[1] if read else {}
    live, found = Live(painter, base.name), {}
    for name in rows or held:
        calls = live.ask(held[name], [(place + 0.5) / TIMES for place in range(TIMES)], seed=7)
        wrong = energy = 0.0
        for call in calls:
            noised, times, states = call.positional
            with torch.no_grad():
                told = place_rows(states, [[rows[name]] if rows else []] * len(states))
                wrong += float((live.network(noised, times, told).sample - call.output).square().sum())
            energy += float(call.output.square().sum())
        found[name] = wrong / energy
    return found


def measure(folder: Path, steps: int, learned: int, tested: int, variants: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each variant and style learned, after one of the base."""
    base = FolderModel(ZOO / "zoo-base", name="zoo-base", family="zoo")
    chosen = drawings(learned * len(STYLES) + tested)
    held: dict[str, list[Picture]] = {}
    for number, (name, style) in enumerate(STYLES.items()):
        (folder / name).mkdir()
        for place, (pixels, label) in enumerate(chosen[learned * number :][:learned]):
            style(Image.fromarray(pixels)).save(folder / name / f"{place}.png")
            (folder / name / f"{place}.txt").write_text(f"a picture of {label}", "utf-8")
        held[name] = [
            Picture(str(place), f"a picture of {label}", style(Image.fromarray(pixels)))
            for place, (pixels, label) in enumerate(chosen[-tested:])
        ]
    rows: list[dict[str, Any]] = [{"variant": "base", "after": "", **errors(base, None, held)}]
    for variant, wish in variants.items():
        version: FolderModel | None = None
        first: dict[str, float] = {}
        for name in STYLES:
            begun, job = process_time(), folder / f"{variant}-{name}"
            params = {"pictures": str(folder / name), "token": name, "steps": steps, "base": True, **RATES, **wish}
            report = run_plugin(MuseumMaker(), [*([version] if version else []), base], job, params).report
            version = FolderModel(job / "out", name=job.name, adapter_type="lora")
            found = errors(base, version, held)
            lost = [found[one] - error for one, error in first.items()]
            first[name] = found[name]
            rows.append({
                "variant": variant, "after": name, **found, "cosine": report["cosine"],
                "forgotten": sum(lost) / len(lost) if lost else None, "cpu_s": round(process_time() - begun),
            })  # fmt: skip
            click.echo(json.dumps(rows[-1]), err=True)  # a run that is stopped has not been for nothing
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    columns = (*STYLES, "forgotten", "cosine")
    made = Table("regularisers", "after", *columns, "cpu_s")
    for row in rows:
        numbers = ["" if row.get(key) is None else f"{row[key]:.3f}" for key in columns]
        made.add_row(row["variant"], row["after"], *numbers, str(row.get("cpu_s", "")))
    return made


@click.command()
@click.option("--quick", is_flag=True, help="Six steps, few drawings, two variants.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--only", multiple=True, type=click.Choice(list(VARIANTS)), help="Only these regularisers; repeatable.")
@click.option("--steps", default=40, show_default=True, type=click.IntRange(1), help="Training steps for each style.")
def main(*, quick: bool, as_json: bool, only: tuple[str, ...], steps: int) -> None:
    """Learn three styles in sequence and ask for all of them after each."""
    torch.set_num_threads(1)
    variants = {name: VARIANTS[name] for name in (("none", "both") if quick else only or VARIANTS)}
    with TemporaryDirectory() as folder:
        rows = measure(Path(folder), *((6, 8, 8) if quick else (steps, LEARNED, TESTED)), variants)
    if as_json:
        click.echo(json.dumps({"load": os.getloadavg()[0], "results": rows}, indent=2))
    else:
        Console(width=110).print(table(rows))


if __name__ == "__main__":
    main()
