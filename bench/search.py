"""How well LoRAs are found by text from their weights alone: `python bench/search.py ZOO [--quick] [--json]`.

ZOO is a folder grown by `modelgrove zoo grow`: models and `truth.jsonl`. For each seed a quarter of
the models of every concept is kept for testing; models of held-out concepts are only tested.
Queries and candidates are the concepts' texts. Every encoder sees the same models.

    in_dist      unseen models of known concepts, top-1 among the known concepts
    zero_shot    models of held-out concepts, top-1 among the held-out concepts (the papers' protocol)
    generalised  the same models, top-1 among all concepts, as in a real search box
    in_dist_all  the models of in_dist, top-1 among all concepts: what the gain of generalised costs
    p1, p5, map  text → model over all tested models, for held-out concepts: share of the queries whose
                 first hit is right, of the first five (or as many as there are), mean average precision
    map_known    the same for known concepts
    plain_p1, plain_generalised
                 p1 and generalised without the calibration of `modelgrove_hub.search.seen`
    loss         what known texts lose in generalised and in_dist_all (`Judge.loss`)
    knn          unseen models whose nearest training model by cosine of vectors has their concept
    fit_s        CPU seconds to fit, from features in memory
    embed_ms     CPU milliseconds to read one new model and place it
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

import modelgrove_analyzers.zoo
from modelgrove_analyzers.encoders.deltas import read_model
from modelgrove_analyzers.encoders.dense import Dense
from modelgrove_analyzers.encoders.embedder import Fitted, WeightsEmbedder
from modelgrove_analyzers.encoders.features import common_layers, stacked
from modelgrove_analyzers.encoders.gram_ridge import GramRidge
from modelgrove_analyzers.encoders.judge import Judge
from modelgrove_analyzers.encoders.lesson import Lesson
from modelgrove_analyzers.encoders.mvprobe import MVProbe
from modelgrove_analyzers.encoders.probex import ProbeX
from modelgrove_analyzers.encoders.statnn import StatNN
from modelgrove_analyzers.encoders.training import label_vectors
from modelgrove_hub.search.background import load_background
from modelgrove_hub.search.seen import ranking_keys
from modelgrove_hub.search.words import words
from modelgrove_hub.testing import FolderModel
from modelgrove_kernels.lowrank import Canonical

TEST_SHARE = 0.25
DATA = Path(modelgrove_analyzers.zoo.__file__).parent / "data"
SAMPLE, BASE = DATA / "sample", DATA / "zoo-base"
SEEDS = 3
QUICK_MODELS = 200
QUICK_EPOCHS = 10
COLUMNS = 16
"""The most that any encoder keeps of a layer."""
UNNAMED = "gram-ridge, names out"
"""The default encoder, but the base is asked for no word that is in a held-out concept's name."""
ENCODERS: dict[str, tuple[type[WeightsEmbedder], dict[str, Any]]] = {
    "gram-ridge": (GramRidge, {}),
    UNNAMED: (GramRidge, {}),
    "gram-ridge --no-ask": (GramRidge, {"ask": False}),
    "probex": (ProbeX, {}),
    "probex --temperature": (ProbeX, {"temperature": True}),
    "mvprobe": (MVProbe, {}),
    "dense": (Dense, {}),
    "statnn": (StatNN, {}),
}


@dataclass(frozen=True)
class Sample:
    """A LoRA, what it shows, and its features."""

    name: str
    concept: str
    held_out: bool
    layers: Mapping[str, Canonical]

    def first(self, columns: int) -> dict[str, Canonical]:
        return {layer: update.first(columns) for layer, update in self.layers.items()}


@dataclass(frozen=True)
class Zoo:
    samples: list[Sample]
    concepts: list[str]
    labels: Tensor
    """(concepts, d)"""
    seconds: float
    """CPU time to read one model's features."""
    base: FolderModel
    """What the LoRAs were grown from."""

    def places(self, samples: Sequence[Sample]) -> list[int]:
        """The numbers of the samples' concepts."""
        return [self.concepts.index(sample.concept) for sample in samples]


def load(folder: Path, most: int | None, base: Path = BASE) -> Zoo:
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
    return Zoo(samples, list(texts), label_vectors(list(texts.values()), load_background()), seconds, FolderModel(base))


def features(path: Path, name: str) -> dict[str, Canonical]:
    return read_model(FolderModel(path, name=name), None, COLUMNS)


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


@dataclass(frozen=True)
class Learned:
    """An encoder fitted on some models of a zoo, and what it knows."""

    fitted: Fitted
    judge: Judge
    columns: int
    known: NDArray[np.bool_]
    """(concepts,)"""
    texts: NDArray[np.float32]
    """(labels, d) that it was fitted on."""
    seconds: float
    """CPU time to fit."""

    def placed(self, samples: Sequence[Sample]) -> Tensor:
        return torch.cat([self.fitted.place(stacked([s.first(self.columns)], self.fitted.shapes)) for s in samples])


def learn(zoo: Zoo, train: Sequence[Sample], encoder: str, seed: int, quick: bool) -> Learned:
    plugin, options = ENCODERS[encoder]
    if quick and "epochs" in plugin.Params.model_fields:
        options = {**options, "epochs": QUICK_EPOCHS}
    params: Any = plugin.Params(**options)
    models = [sample.first(params.columns) for sample in train]
    lesson = Lesson(
        stacked(models, common_layers(models)),
        zoo.labels[zoo.places(train)],
        load_background(),
        params.alike,
        torch.Generator().manual_seed(seed),
        base=zoo.base,
        words=asked(zoo) if encoder == UNNAMED else words(),
    )
    started = time.process_time()
    fitted, judge = plugin().learn(lesson, params)
    assert isinstance(judge, Judge)
    seconds = time.process_time() - started
    known = np.isin(np.arange(len(zoo.concepts)), zoo.places(train))
    return Learned(fitted, judge, params.columns, known, lesson.texts.numpy(), seconds)


def found(zoo: Zoo, learned: Learned, test: Sequence[Sample], vectors: NDArray[np.float32]) -> dict[str, float]:
    """What is measured of tested models alone, from where they are placed."""
    background, texts, known = load_background(), zoo.labels.numpy(), learned.known
    own = np.array(zoo.places(test))
    held = ~known[own]
    plain_margins = background.margins(vectors, texts, learned.judge.known.vectors.numpy())
    margins = plain_margins - learned.judge.loss * known
    plain_scores = background.scores(vectors, texts)
    scores = ranking_keys(background, vectors, texts, learned.texts)
    right, every = own[:, None] == np.arange(len(zoo.concepts)), np.ones_like(known)
    return {
        "test": len(test),
        "in_dist": top1(margins[~held], own[~held], known),
        "zero_shot": top1(margins[held], own[held], ~known),
        "generalised": top1(margins[held], own[held], every),
        "in_dist_all": top1(margins[~held], own[~held], every),
        **retrieval(scores[:, ~known], right[:, ~known]),
        "map_known": retrieval(scores[:, known], right[:, known])["map"],
        "plain_p1": retrieval(plain_scores[:, ~known], right[:, ~known])["p1"],
        "plain_generalised": top1(plain_margins[held], own[held], every),
    }


def measure(zoo: Zoo, encoder: str, seed: int, quick: bool) -> dict[str, float]:
    train, test = split(zoo, seed)
    learned = learn(zoo, train, encoder, seed, quick)
    started = time.process_time()
    vectors = learned.placed(test)
    embed_seconds = (time.process_time() - started) / len(test) + zoo.seconds
    neighbours = (vectors @ learned.placed(train).T).argmax(1)
    nearest = [train[i].concept == s.concept for i, s in zip(neighbours.tolist(), test, strict=True) if not s.held_out]
    return {
        "train": len(train),
        **found(zoo, learned, test, vectors.numpy()),
        "loss": learned.judge.loss,
        "knn": float(np.mean(nearest)),
        "missed": learned.judge.metrics()["missed"],
        "false_alarms": learned.judge.metrics()["false_alarms"],
        "fit_s": learned.seconds,
        "embed_ms": 1000 * embed_seconds,
        "parameters": sum(tensor.numel() for tensor in learned.fitted.tensors().values()),
    }


def asked(zoo: Zoo) -> list[str]:
    """The words without those that held-out concepts are called by: what search knows when no list names a thing."""
    names = {part for sample in zoo.samples if sample.held_out for part in sample.concept.split()}
    return [word for word in words() if names.isdisjoint(word.split())]


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
    values = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: (float(np.mean(several)), float(np.std(several))) for name, several in values.items()}


def shown(mean: float, spread: float) -> str:
    if np.isnan(mean):
        return "–"
    return f"{mean:.3f} ± {spread:.3f}" if abs(mean) < 100 else f"{mean:,.0f}"


@click.command()
@click.argument("zoo", type=click.Path(exists=True, file_okay=False, path_type=Path), default=SAMPLE)
@click.option("--base", type=click.Path(exists=True, file_okay=False, path_type=Path), default=BASE, help="Their base.")
@click.option("--encoder", "encoders", multiple=True, type=click.Choice(list(ENCODERS)), help="Only this one.")
@click.option("--quick", is_flag=True, help=f"One seed, {QUICK_EPOCHS} epochs, at most {QUICK_MODELS} models.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def main(zoo: Path, base: Path, encoders: tuple[str, ...], quick: bool, as_json: bool) -> None:
    """Measure text search over the LoRAs of ZOO; the shipped sample when left out."""
    torch.set_num_threads(1)
    loaded = load(zoo, QUICK_MODELS if quick else None, base)
    measured = {}
    for encoder in encoders or ENCODERS:
        measured[encoder] = [measure(loaded, encoder, seed, quick) for seed in range(1 if quick else SEEDS)]
        click.echo(f"{encoder}: done", err=True)
    if as_json:
        click.echo(json.dumps({"zoo": str(zoo), "encoders": measured}, indent=2))
        return
    table = Table("measure", *measured, title=f"{zoo}: {len(loaded.samples)} LoRAs, {len(loaded.concepts)} concepts")
    columns = [summary(rows) for rows in measured.values()]
    for name in columns[0]:
        table.add_row(name, *(shown(*column[name]) for column in columns))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
