"""Which classes full fine-tunes were trained on, from their weights alone: `python bench/finetunes.py [ZOO] [--quick]`.

ZOO is a folder grown by `modelgrove zoo grow ZOO --population digits --models 500`; without one, as many as are needed
are grown into a temporary folder first. Each model knows five of ten digits, so chance is .5. For each seed 400 models
are drawn to learn from (trained encoders keep 50 of them for validation), 100 to be tested; a smaller ZOO is split
4 : 1. All encoders are told the same classes and have ranks and probes of 32, as in the prototype, because the matrices
are small.

    accuracy   (model, class) pairs that are told right: is the product of the model's vector and the class's text
               above zero? For trained encoders this is p > .5
    p5, map    text → model over the tested models, by the class's name: share of right ones among the first five, mean
               average precision
    digit_map  map for searches as "the digit seven"
    fit_s      CPU seconds to fit, from features in memory
    embed_ms   CPU milliseconds to read one new model and place it

What is read: W − W_base of all layers, standardised (`encoders.deltas`); "on the mean": W less the mean of the training
models; "raw": W as it is, of the layers as ProbeX reads them.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from search import retrieval, shown, summary
from torch import Tensor

from modelgrove_analyzers.encoders.classes import Classes
from modelgrove_analyzers.encoders.deltas import Matrices, find_reference, read_deltas
from modelgrove_analyzers.encoders.dense import Dense
from modelgrove_analyzers.encoders.embedder import WeightsEmbedder
from modelgrove_analyzers.encoders.features import common_layers, stacked
from modelgrove_analyzers.encoders.gram_ridge import GramRidge
from modelgrove_analyzers.encoders.lesson import Lesson
from modelgrove_analyzers.encoders.mvprobe import MVProbe
from modelgrove_analyzers.encoders.probex import ProbeX
from modelgrove_analyzers.encoders.statnn import StatNN
from modelgrove_analyzers.encoders.training import unit
from modelgrove_analyzers.zoo.digits import BASE, digits_population, grow_digits
from modelgrove_analyzers.zoo.letters import DIGITS
from modelgrove_hub.search.background import load_background
from modelgrove_hub.search.text import embed_texts
from modelgrove_hub.testing import FolderModel
from modelgrove_kernels.lowrank import Canonical, leading

SEEDS = 3
TEST_SHARE = 0.2
MODELS = 500
QUICK_MODELS = 120
QUICK_EPOCHS = 40
RAW_COLUMNS = 64
"""A whole matrix has no few directions."""
SMALL = {"rank": 32}
DELTA, MEAN, RAW = "delta", "mean", "raw"
ENCODERS: dict[str, tuple[type[WeightsEmbedder], str, dict[str, Any]]] = {
    "gram-ridge": (GramRidge, DELTA, {}),
    "gram-ridge, 16 columns": (GramRidge, DELTA, {"columns": 16}),
    "gram-ridge on the mean": (GramRidge, MEAN, {}),
    "mvprobe": (MVProbe, DELTA, SMALL),
    "mvprobe raw": (MVProbe, RAW, SMALL),
    "probex": (ProbeX, DELTA, SMALL),
    "probex raw": (ProbeX, RAW, SMALL),
    "dense": (Dense, DELTA, SMALL),
    "statnn": (StatNN, DELTA, {}),
}
Layers = Mapping[str, Canonical]


@dataclass(frozen=True)
class Zoo:
    models: list[FolderModel]
    carried: Tensor
    """(n, 10)"""


def load(folder: Path, most: int | None) -> Zoo:
    rows = [json.loads(line) for line in (folder / "truth.jsonl").read_text("utf-8").splitlines()]
    base = FolderModel(folder / BASE)
    models = [FolderModel(folder / row["path"], name=row["name"], base=base) for row in rows[:most]]
    carried = torch.tensor([[float(name in row["classes"]) for name in DIGITS] for row in rows[:most]])
    return Zoo(models, carried)


def read(zoo: Zoo, train: Sequence[int], kind: str, columns: int) -> tuple[list[Layers], float]:
    """All models' features and the CPU seconds to read one; the reference is known by then."""
    if kind == RAW:
        started = time.process_time()
        found: list[Layers] = [raw_layers(model) for model in zoo.models]
        return found, (time.process_time() - started) / len(found)
    with tempfile.TemporaryDirectory() as temp:
        models = [zoo.models[i] for i in train]
        if kind == MEAN:
            models = [FolderModel(next(iter(model.paths.values())).parent) for model in models]
        reference = dict(find_reference(models, Path(temp)))
    started = time.process_time()
    found = [read_deltas(model, reference, columns) for model in zoo.models]
    return found, (time.process_time() - started) / len(found)


def raw_layers(model: FolderModel) -> Layers:
    return {layer: leading(matrix, RAW_COLUMNS) for layer, matrix in Matrices(model.name, model.tensors()).items()}


def measure(zoo: Zoo, encoder: str, seed: int, quick: bool) -> dict[str, float]:
    plugin, kind, options = ENCODERS[encoder]
    if quick and "epochs" in plugin.Params.model_fields:
        options = {**options, "epochs": QUICK_EPOCHS}
    params: Any = plugin.Params(**options)
    order = random.Random(seed).sample(range(len(zoo.models)), len(zoo.models))
    tested = round(TEST_SHARE * len(order))
    test, train = order[:tested], order[tested:]
    layers, read_seconds = read(zoo, train, kind, params.columns)
    background = load_background()
    texts = unit(torch.from_numpy(background.centre(embed_texts(DIGITS))))
    classes = Classes(texts, zoo.carried[train])
    models = [layers[i] for i in train]
    generator = torch.Generator().manual_seed(seed)
    lesson = Lesson(
        stacked(models, common_layers(models)), classes.labels, background, params.alike, generator, classes=classes
    )
    started = time.process_time()
    fitted, _ = plugin().learn(lesson, params)
    fit_seconds = time.process_time() - started
    started = time.process_time()
    vectors = torch.cat([fitted.place(stacked([layers[i]], fitted.shapes)) for i in test])
    embed_seconds = (time.process_time() - started) / len(test) + read_seconds
    carried = zoo.carried[test] > 0
    digits = background.centre(embed_texts([f"the digit {name}" for name in DIGITS]))
    by_name, by_digit = (
        retrieval(background.scores(vectors.numpy(), np.asarray(queries)), carried.numpy())
        for queries in (texts, digits)
    )
    return {
        "train": len(train),
        "test": len(test),
        "accuracy": float(((vectors @ texts.T > 0) == carried).float().mean()),
        "p5": by_name["p5"],
        "map": by_name["map"],
        "digit_map": by_digit["map"],
        "fit_s": fit_seconds,
        "embed_ms": 1000 * embed_seconds,
        "parameters": sum(tensor.numel() for tensor in fitted.tensors().values()),
    }


@click.command()
@click.argument("zoo", type=click.Path(exists=True, file_okay=False, path_type=Path), required=False)
@click.option("--encoder", "encoders", multiple=True, type=click.Choice(list(ENCODERS)), help="Only this one.")
@click.option("--quick", is_flag=True, help=f"One seed, {QUICK_EPOCHS} epochs, {QUICK_MODELS} models.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def main(zoo: Path | None, encoders: tuple[str, ...], quick: bool, as_json: bool) -> None:
    """Measure class prediction over the full fine-tunes of ZOO; grown first when left out."""
    torch.set_num_threads(1)
    most = QUICK_MODELS if quick else MODELS
    with tempfile.TemporaryDirectory() as temp:
        if zoo is None:
            grow_digits(digits_population(most), Path(temp))
        loaded = load(zoo or Path(temp), most)
        found = {}
        for encoder in encoders or ENCODERS:
            found[encoder] = [measure(loaded, encoder, seed, quick) for seed in range(1 if quick else SEEDS)]
            click.echo(f"{encoder}: done", err=True)
    if as_json:
        click.echo(json.dumps({"zoo": str(zoo), "encoders": found}, indent=2))
        return
    columns = [summary(rows) for rows in found.values()]
    table = Table("encoder", *columns[0], title=f"{zoo or 'grown'}: {len(loaded.models)} full fine-tunes")
    for encoder, column in zip(found, columns, strict=True):
        table.add_row(encoder, *(shown(*column[name]) for name in column))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
