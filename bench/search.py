"""How well LoRAs are found by text from their weights alone: `python bench/search.py ZOO [--quick] [--json]`.

ZOO is a folder grown by `modelgrove zoo grow`: models and `truth.jsonl`. For each seed a quarter of
the models of every concept is kept for testing; models of held-out concepts are only tested.
Queries and candidates are the concepts' texts.

    in_dist      unseen models of known concepts, top-1 among the known concepts
    zero_shot    models of held-out concepts, top-1 among the held-out concepts (the papers' protocol)
    generalised  the same models, top-1 among all concepts, as in a real search box
    p1, p5, map  text → model over all tested models, for held-out concepts: share of the queries whose
                 first hit is right, of the first five (or as many as there are), mean average precision
    map_known    the same for known concepts
    knn          unseen models whose nearest training model by cosine of vectors has their concept
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from modelgrove_analyzers.encoders.gram_ridge import Options, fit, roots_of, stacked
from modelgrove_analyzers.encoders.training import label_vectors
from modelgrove_hub.formats.adapters import read_adapter
from modelgrove_hub.search.background import load_background
from modelgrove_hub.testing import FolderModel

TEST_SHARE = 0.25
SEEDS = 3
QUICK_MODELS = 200


@dataclass(frozen=True)
class Sample:
    """A LoRA, what it shows, and its features."""

    name: str
    concept: str
    held_out: bool
    roots: dict[str, Tensor]


@dataclass(frozen=True)
class Zoo:
    samples: list[Sample]
    concepts: list[str]
    labels: Tensor
    """(concepts, d)"""
    seconds: float
    """CPU time to read one model's features."""


def load(folder: Path, most: int | None) -> Zoo:
    rows = [json.loads(line) for line in (folder / "truth.jsonl").read_text("utf-8").splitlines()]
    if most is not None:
        random.Random(0).shuffle(rows)
        rows = rows[:most]
    texts = {row["concept"]: (row["concept"], row["text"]) for row in rows}
    started = time.process_time()
    samples = [
        Sample(row["name"], row["concept"], row["held_out"], features(folder / row["path"], row["name"]))
        for row in rows
    ]
    seconds = (time.process_time() - started) / len(rows)
    return Zoo(samples, list(texts), label_vectors(list(texts.values()), load_background()), seconds)


def features(path: Path, name: str) -> dict[str, Tensor]:
    return roots_of(read_adapter(FolderModel(path, name=name)), Options().columns)


def split(zoo: Zoo, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Training and test samples; a concept with one model only is trained on."""
    train: list[Sample] = []
    test = [sample for sample in zoo.samples if sample.held_out]
    for concept in zoo.concepts:
        own = [sample for sample in zoo.samples if sample.concept == concept and not sample.held_out]
        random.Random(f"{seed} {concept}").shuffle(own)
        kept = 0 if len(own) < 2 else max(1, round(TEST_SHARE * len(own)))
        test += own[:kept]
        train += own[kept:]
    return train, test


def measure(zoo: Zoo, seed: int) -> dict[str, float]:
    background = load_background()
    train, test = split(zoo, seed)
    place = {concept: i for i, concept in enumerate(zoo.concepts)}
    started = time.process_time()
    fitted, judge = fit(
        stacked([s.roots for s in train]), zoo.labels[[place[s.concept] for s in train]], background, Options().alike
    )
    fit_seconds = time.process_time() - started
    started = time.process_time()
    vectors = torch.cat([fitted.place({k: v[None] for k, v in s.roots.items() if k in fitted.roots}) for s in test])
    embed_seconds = (time.process_time() - started) / len(test) + zoo.seconds
    scores = background.scores(vectors.numpy(), zoo.labels.numpy())
    margins = background.margins(vectors.numpy(), zoo.labels.numpy(), judge.known.numpy())
    own = np.array([place[s.concept] for s in test])
    held = np.array([s.held_out for s in test])
    known = np.zeros(len(zoo.concepts), bool)
    known[[place[s.concept] for s in train]] = True
    right = own[:, None] == np.arange(len(zoo.concepts))
    neighbours = (vectors @ fitted.places.T).argmax(1)
    nearest = np.array([train[i].concept == s.concept for i, s in zip(neighbours.tolist(), test, strict=True)])
    return {
        "train": len(train),
        "test": len(test),
        "in_dist": top1(margins[~held], own[~held], known),
        "zero_shot": top1(margins[held], own[held], ~known),
        "generalised": top1(margins[held], own[held], np.ones_like(known)),
        **retrieval(scores[:, ~known], right[:, ~known]),
        "map_known": retrieval(scores[:, known], right[:, known])["map"],
        "knn": float(nearest[~held].mean()),
        "missed": judge.metrics()["missed"],
        "false_alarms": judge.metrics()["false_alarms"],
        "fit_s": fit_seconds,
        "embed_ms": 1000 * embed_seconds,
        "parameters": sum(root.numel() for root in fitted.roots.values()) + fitted.dual.numel(),
    }


def top1(scores: NDArray[np.float32], own: NDArray[np.int64], candidates: NDArray[np.bool_]) -> float:
    if not len(scores):
        return float("nan")
    return float((np.where(candidates, scores, -np.inf).argmax(1) == own).mean())


def retrieval(scores: NDArray[np.float32], right: NDArray[np.bool_]) -> dict[str, float]:
    """Means over the queries (columns) that have a right model."""
    found: list[tuple[float, float, float]] = []
    for column in np.flatnonzero(right.any(0)):
        hits = right[np.argsort(-scores[:, column], kind="stable"), column]
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        found.append((float(hits[0]), hits[:5].sum() / min(5, hits.sum()), float(precision[hits].mean())))
    means = np.mean(found, axis=0) if found else [float("nan")] * 3
    return dict(zip(("p1", "p5", "map"), map(float, means), strict=True))


def summary(rows: Sequence[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over the seeds."""
    return {
        name: (statistics.mean(row[name] for row in rows), statistics.pstdev([row[name] for row in rows]))
        for name in rows[0]
    }


@click.command()
@click.argument("zoo", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--quick", is_flag=True, help=f"One seed and at most {QUICK_MODELS} models.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def main(zoo: Path, quick: bool, as_json: bool) -> None:
    """Measure text search over the LoRAs of ZOO."""
    torch.set_num_threads(1)
    loaded = load(zoo, QUICK_MODELS if quick else None)
    rows = [measure(loaded, seed) for seed in range(1 if quick else SEEDS)]
    if as_json:
        click.echo(json.dumps({"zoo": str(zoo), "encoder": "gram-ridge", "seeds": rows}, indent=2))
        return
    table = Table("measure", "gram-ridge", title=f"{zoo}: {len(loaded.samples)} LoRAs, {len(loaded.concepts)} concepts")
    for name, (mean, spread) in summary(rows).items():
        table.add_row(name, f"{mean:.3f} ± {spread:.3f}" if abs(mean) < 100 else f"{mean:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
