"""How search over LoRA weights holds where the recipe changes: `python bench/recipes.py ZOO [--also FOLDER] [--json]`.

ZOO is a folder grown by `modelgrove zoo grow` (`search.py`). Encoders are fitted on its LoRAs of rank 4 alone, but for
a quarter of those of each concept and for held-out concepts; a row of the table is one set of LoRAs that they are
tested on, and the columns are those of `search.py`.

    rank 4        those that were kept from fitting: the recipe is the same
    rank r        the zoo's LoRAs of another rank
    bfloat16      copies of "rank 4" with factors of 8 bits of precision (the zoo's own files are float16)
    8-bit         copies of "rank 4" whose factors' rows are rounded to 255 steps, as `rtn` rounds weights, then float16
    merged        sums of two LoRAs of "rank 4" with different concepts, as `merge sum` makes them. Both concepts are
                  right: in_dist and generalised are the share of them that the first two texts are
    FOLDER        its LoRAs, LoHas or DoRAs, exported as whole differences of weights

A concept is known where the encoder was fitted on a LoRA of it, in whichever row.

With `--artist-out NAME` they are fitted on LoRAs of any rank that saw no drawing by NAME, and tested on

    others        those that were kept from fitting
    NAME          LoRAs that saw drawings by NAME alone
    NAME, others  LoRAs that saw drawings by both
"""

from __future__ import annotations

import itertools
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from search import (
    COLUMNS,
    DATA,
    ENCODERS,
    SAMPLE,
    SEEDS,
    Learned,
    Sample,
    Zoo,
    found,
    learn,
    load,
    retrieval,
    shown,
    split,
    summary,
)
from torch import Tensor

from modelgrove_analyzers.encoders.deltas import read_model
from modelgrove_analyzers.encoders.features import read_layers
from modelgrove_analyzers.zoo.base_folder import open_base
from modelgrove_analyzers.zoo.export import write_differences
from modelgrove_analyzers.zoo.grow import read_loras, read_truth
from modelgrove_analyzers.zoo.loras import differences
from modelgrove_hub.formats.adapters import Factors, read_adapter
from modelgrove_hub.search.background import load_background
from modelgrove_hub.search.seen import ranking_keys
from modelgrove_hub.testing import FolderModel

RANK = 4
STEPS = 127
"""Largest of the whole numbers that 8 bits with a sign hold."""
COMPARED = ("gram-ridge", "probex")

Row = Mapping[str, Any]
Test = Callable[[Learned], dict[str, float]]


@dataclass(frozen=True)
class Recipes:
    """A zoo with the truth about its models."""

    folder: Path
    zoo: Zoo
    rows: Mapping[str, Row]

    def only(self, wanted: Callable[[Row], bool]) -> Zoo:
        return replace(self.zoo, samples=[s for s in self.zoo.samples if wanted(self.rows[s.name])])

    def tested(self, samples: Sequence[Sample]) -> Test:
        def test(learned: Learned) -> dict[str, float]:
            return found(self.zoo, learned, samples, learned.placed(samples).numpy()) if samples else {"test": 0}

        return test

    def copied(self, samples: Sequence[Sample], change: Callable[[Tensor], Tensor]) -> list[Sample]:
        """The samples with changed factors."""
        return [replace(sample, layers=_layers(self._factors(sample), change)) for sample in samples]

    def merged(self, samples: Sequence[Sample], seed: int) -> Test:
        """Each sample summed with one of another concept."""
        partners = list(samples)
        random.Random(seed).shuffle(partners)
        pairs = [(a, b) for a, b in zip(samples, partners, strict=True) if a.concept != b.concept]
        sums = [replace(a, layers=_layers(_sum(self._factors(a), self._factors(b)))) for a, b in pairs]
        return lambda learned: self._both(learned, pairs, sums)

    def _both(
        self, learned: Learned, pairs: Sequence[tuple[Sample, Sample]], sums: Sequence[Sample]
    ) -> dict[str, float]:
        background, texts, vectors = load_background(), self.zoo.labels.numpy(), learned.placed(sums).numpy()
        right = np.zeros((len(pairs), len(texts)), bool)
        for row, pair in zip(right, pairs, strict=True):
            row[self.zoo.places(pair)] = True
        margins = (
            background.margins(vectors, texts, learned.judge.known.vectors.numpy()) - learned.judge.loss * learned.known
        )
        first = np.argsort(-margins, axis=1)[:, :2]
        told = np.take_along_axis(right, first, axis=1).sum(1) / 2
        known = np.array([learned.known[self.zoo.places(pair)] for pair in pairs])
        held, unheld = ~known.any(1), known.all(1)
        scores = ranking_keys(background, vectors, texts, learned.texts)
        return {
            "test": len(pairs),
            "in_dist": float(told[unheld].mean()) if unheld.any() else float("nan"),
            "generalised": float(told[held].mean()) if held.any() else float("nan"),
            **retrieval(scores[:, ~learned.known], right[:, ~learned.known]),
            "map_known": retrieval(scores[:, learned.known], right[:, learned.known])["map"],
        }

    def _factors(self, sample: Sample) -> dict[str, Factors]:
        path = self.folder / self.rows[sample.name]["path"]
        return dict(read_adapter(FolderModel(path, name=sample.name)).modules)


def _layers(factors: Mapping[str, Factors], change: Callable[[Tensor], Tensor] = lambda part: part) -> dict[str, Any]:
    changed = {name: replace(one, down=change(one.down), up=change(one.up)) for name, one in factors.items()}
    return read_layers(changed.items(), COLUMNS)


def _sum(one: Mapping[str, Factors], other: Mapping[str, Factors]) -> dict[str, Factors]:
    return {
        name: replace(a, down=torch.cat([a.down, other[name].down]), up=torch.cat([a.up, other[name].up], 1))
        for name, a in one.items()
    }


def eight_bits(part: Tensor) -> Tensor:
    step = part.abs().amax(1, keepdim=True).clamp(min=1e-30) / STEPS
    return ((part / step).round() * step).half().float()


def exported(folder: Path) -> list[Sample]:
    """The models of another grown folder, by way of files of whole differences."""
    base, rows = open_base(DATA / "zoo-base"), list(read_truth(folder).values())
    samples = []
    with tempfile.TemporaryDirectory() as temp:
        for row, lora in zip(rows, read_loras(folder, base, len(rows)), strict=True):
            path = Path(temp) / f"{row['name']}.safetensors"
            write_differences(differences(base.unet, lora), path)
            layers = read_model(FolderModel(path, name=row["name"]), None, COLUMNS)
            path.unlink()
            samples.append(Sample(row["name"], row["concept"], row["held_out"], layers))
    return samples


def by_rank(recipes: Recipes, also: Sequence[Path], seed: int) -> Iterator[tuple[Any, ...]]:
    """The models to fit on, then (name, test)."""
    train, kept = split(recipes.only(lambda row: row["recipe"]["rank"] == RANK), seed)
    yield "", train
    yield f"rank {RANK}", recipes.tested(kept)
    for rank in sorted({row["recipe"]["rank"] for row in recipes.rows.values()} - {RANK}):
        yield f"rank {rank}", recipes.tested(recipes.only(lambda row, rank=rank: row["recipe"]["rank"] == rank).samples)
    yield "bfloat16", recipes.tested(recipes.copied(kept, lambda part: part.bfloat16().float()))
    yield "8-bit", recipes.tested(recipes.copied(kept, eight_bits))
    yield "merged", recipes.merged(kept, seed)
    for folder in also:
        yield f"{folder.name} → ΔW", recipes.tested([s for s in exported(folder) if s.concept in recipes.zoo.concepts])


def by_artist(recipes: Recipes, artist: str, seed: int) -> Iterator[tuple[Any, ...]]:
    """The models to fit on, then (name, test)."""
    train, kept = split(recipes.only(lambda row: artist not in row["recipe"]["artists"]), seed)
    seen = recipes.only(lambda row: artist in row["recipe"]["artists"]).samples
    alone = [s for s in seen if recipes.rows[s.name]["recipe"]["artists"] == [artist]]
    yield "", train
    yield "others", recipes.tested(kept)
    yield artist, recipes.tested(alone)
    yield f"{artist}, others", recipes.tested([s for s in seen if s not in alone])


@click.command()
@click.argument("zoo", type=click.Path(exists=True, file_okay=False, path_type=Path), default=SAMPLE)
@click.option("--also", multiple=True, type=click.Path(exists=True, file_okay=False, path_type=Path), help="A folder.")
@click.option("--artist-out", help="Leave this artist out instead of ranks.")
@click.option("--encoder", "encoders", multiple=True, type=click.Choice(list(ENCODERS)), default=COMPARED)
@click.option("--quick", is_flag=True, help="One seed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def main(
    zoo: Path, also: tuple[Path, ...], artist_out: str | None, encoders: tuple[str, ...], quick: bool, as_json: bool
) -> None:
    """Fit on one recipe of ZOO's and measure on others; the shipped sample when left out."""
    torch.set_num_threads(1)
    recipes = Recipes(zoo, load(zoo, None), read_truth(zoo))
    measured: dict[str, dict[str, list[dict[str, float]]]] = {encoder: {} for encoder in encoders}
    for encoder, seed in itertools.product(encoders, range(1 if quick else SEEDS)):
        (_, train), *tests = by_artist(recipes, artist_out, seed) if artist_out else by_rank(recipes, also, seed)
        learned = learn(recipes.zoo, train, encoder, seed, quick=False)
        for name, test in tests:
            measured[encoder].setdefault(name, []).append({"train": len(train), **test(learned)})
        click.echo(f"{encoder}, seed {seed}: done", err=True)
    if as_json:
        click.echo(json.dumps({"zoo": str(zoo), "encoders": measured}, indent=2))
        return
    for encoder, sets in measured.items():
        columns = ("train", "test", "in_dist", "zero_shot", "generalised", "p1", "p5", "map", "map_known")
        table = Table("tested on", *columns, title=f"{encoder} on {zoo}")
        for name, rows in sets.items():
            means = summary(rows)
            table.add_row(name, *(shown(*means[column]) if column in means else "" for column in columns))
        Console(width=200).print(table)


if __name__ == "__main__":
    main()
