"""Who came from whom: the part **heritage** of `bench/trust.py`.

    python bench/trust.py heritage FOLDER

Two zoos whose ancestry is known because it was grown: trees of small classifiers (`zoo.ancestry`: all siblings learn
digits, so they learn alike, which is the hard case) and families of UNets (`zoo.chains`). A row for every method:

    edges     share of models whose parent is found, merges and bases left out
    roots     trees whose first model is found
    seconds   a model, on the clock, from manifests

`tree` is the plugin, with the order of making as times, without times, and without times or root. `nearest` takes the
nearest earlier model, or the nearest; `MoTHer` is Edmonds' arborescence on normalised differences with kurtosis for
direction (arXiv 2405.18432, section 4; λ = 0.3), the better of the two directions. Then: merges called, their weights'
largest error, false positives among pairs, and how the probabilities fit.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import click
import networkx as nx
import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score

import modelgrove_analyzers
from modelgrove_analyzers.heritage.facts import facts_of
from modelgrove_analyzers.heritage.tree import Tree
from modelgrove_analyzers.zoo.ancestry import Size, grow_trees
from modelgrove_analyzers.zoo.base_folder import open_base
from modelgrove_analyzers.zoo.chains import ROOT, grow_family, sample_family
from modelgrove_analyzers.zoo.pictures import PictureSet
from modelgrove_hub.registry.inputs import RegisteredModel
from modelgrove_hub.registry.kinship import RELATED, weights_of
from modelgrove_hub.store.manifest import scan
from modelgrove_hub.testing import run_plugin

ZOO = Path(modelgrove_analyzers.__file__).parent / "zoo/data"
MOVED = ("permuted", "rescaled")
LAMBDA = 0.3


@dataclass(frozen=True)
class Known:
    """A model on disk and the truth about it; models of a family stand in the order in which they were made."""

    model: RegisteredModel
    made_by: str
    parents: tuple[str, ...]
    shares: tuple[float, ...] = ()


Family = list[Known]


def on_disk(file: Path, name: str, number: int) -> RegisteredModel:
    """A model with the manifest that ingest would make."""
    manifest = file.with_suffix(".manifest")
    manifest.write_text(scan(file).to_json(), "utf-8")
    return RegisteredModel(
        name, "zoo", None, number, {}, "", (), {file.name: file}, manifests={file.name: manifest}
    )  # fmt: skip


def classifiers(folder: Path, trees: int, seed: int, size: Size) -> list[Family]:
    """Trees of classifiers, without their permuted and rescaled copies."""
    families: dict[int, Family] = defaultdict(list)
    for one in grow_trees(trees, seed, size):
        if one.made_by in MOVED:
            continue
        file = folder / f"{one.name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in one.weights.items()}, file)
        known = families[one.tree]
        known.append(Known(on_disk(file, one.name, len(known) + 1), one.made_by, one.parents, one.shares))
    return list(families.values())


def unets(folder: Path, seeds: Sequence[int]) -> Iterator[Family]:
    """Families of UNets: twelve models each and the base."""
    base, pictures = open_base(ZOO / "zoo-base"), PictureSet.load(ZOO)
    for seed in seeds:
        place = folder / f"unets-{seed}"
        truth = grow_family(sample_family(seed), base, pictures, place)
        base.unet.float().save_pretrained(place / ROOT)
        rows = [{"name": ROOT, "parents": [], "made_by": "base", "recipe": {}}, *truth]
        yield [
            Known(
                on_disk(next((place / row["name"]).glob("*.safetensors")), row["name"], number),
                "merge" if row["made_by"] == "Average" else row["made_by"],
                tuple(row["parents"]),
                tuple(row["recipe"].get("weights", ())),
            )
            for number, row in enumerate(rows, 1)
        ]


# ---- methods: the names of the parents of each model ----------------------------------------

Answer = list[dict[str, Any]]


def by_tree(family: Family, temp: Path, *, times: bool, root: bool) -> Answer:
    params: dict[str, Any] = {"times": [86400.0 * n for n in range(len(family))]} if times else {}
    # Names and places of the others say nothing: the order is turned round behind the root.
    turned = [0, *range(len(family) - 1, 0, -1)]
    if times:
        params["times"] = [params["times"][number] for number in turned]
    if root:
        params["root"] = 0
    report = run_plugin(Tree(), [family[number].model for number in turned], temp, params).report
    found = {row["name"]: row for row in report["models"]}
    return [found[known.model.name] for known in family]


def by_nearest(family: Family, _temp: Path, *, times: bool) -> Answer:
    points = [np.concatenate([t.float().flatten().numpy() for t in _weights(known).values()]) for known in family]
    answers: Answer = []
    for number, point in enumerate(points):
        others = [n for n in range(number if times else len(points)) if n != number]
        nearest = min(others, key=lambda n: float(np.square(points[n] - point).sum()), default=None)
        answers.append({"parents": [] if nearest is None else [family[nearest].model.name]})
    return answers


def by_mother(family: Family, _temp: Path, *, lower: bool) -> Answer:
    """`lower`: whether training is taken to lower the kurtosis."""
    layers: dict[str, list[Any]] = defaultdict(list)
    for known in family:
        for name, tensor in _weights(known).items():
            if tensor.ndim >= 2:
                layers[name].append(tensor.float().numpy().ravel())
    count = len(family)
    worst, kurtosis = np.zeros((count, count)), np.zeros(count)
    for matrices in layers.values():
        found = np.array([[float(np.abs(a - b).mean()) for a in matrices] for b in matrices])
        apart = found[~np.eye(count, dtype=bool)]
        worst = np.maximum(worst, (found - apart.min()) / max(float(np.ptp(apart)), 1e-30))
        kurtosis += [float((((m - m.mean()) / m.std()) ** 4).mean()) for m in matrices]
    against = kurtosis[:, None] < kurtosis[None, :] if lower else kurtosis[:, None] > kurtosis[None, :]
    cost = worst + LAMBDA * worst.mean() * against
    graph = nx.DiGraph([(i, j, {"weight": cost[i, j]}) for i in range(count) for j in range(count) if i != j])
    chosen = {child: parent for parent, child in nx.minimum_spanning_arborescence(graph).edges}
    return [{"parents": [family[chosen[n]].model.name] if n in chosen else []} for n in range(count)]


def _weights(known: Known) -> Mapping[str, Any]:
    [file] = known.model.files().values()
    return load_file(file)


METHODS: dict[str, Callable[[Family, Path], Answer]] = {
    "tree, times": lambda family, temp: by_tree(family, temp, times=True, root=False),
    "tree, root": lambda family, temp: by_tree(family, temp, times=False, root=True),
    "tree": lambda family, temp: by_tree(family, temp, times=False, root=False),
    "nearest earlier": lambda family, temp: by_nearest(family, temp, times=True),
    "nearest": lambda family, temp: by_nearest(family, temp, times=False),
    "MoTHer": lambda family, temp: by_mother(family, temp, lower=True),
    "MoTHer, turned": lambda family, temp: by_mother(family, temp, lower=False),
}


# ---- what is counted --------------------------------------------------------------------------


def count(families: Sequence[Family], answers: Sequence[Answer]) -> dict[str, Any]:
    """Edges and roots that are right; of merges, how many are called and the largest error of a weight."""
    right, kinds, errors = [], defaultdict(list), []
    merges = called = false = roots = 0
    for family, answer in zip(families, answers, strict=True):
        for known, row in zip(family, answer, strict=True):
            weights = dict(zip(row["parents"], row.get("weights", ()), strict=False))
            if known.made_by == "merge":
                merges, called = merges + 1, called + bool(weights)
                truth = dict(zip(known.parents, known.shares, strict=True))
                errors += [abs(weights.get(n, 0) - truth.get(n, 0)) for n in weights.keys() | truth.keys() if weights]
                continue
            false += bool(weights)
            if not known.parents:
                roots += not row["parents"]
                continue
            found = row["parents"] == list(known.parents)
            right.append((found, row.get("probability"), row.get("verdict")))
            kinds[known.made_by].append(found)
    return {
        "edges": float(np.mean([found for found, *_ in right])), "of": len(right), "roots": roots,
        "by_kind": {kind: float(np.mean(found)) for kind, found in kinds.items()},
        "merges": merges, "merges_called": called, "false_merges": false,
        "largest_weight_error": max(errors, default=None), "calibration": _calibration(right),
    }  # fmt: skip


def _calibration(right: Sequence[tuple[bool, float | None, str | None]]) -> list[dict[str, Any]]:
    rows = []
    for low, high in ((0, 0.5), (0.5, 0.7), (0.7, 0.9), (0.9, 1.01)):
        found = [(ok, p) for ok, p, _ in right if p is not None and low <= p < high]
        if found:
            told, true = (float(np.mean(column)) for column in zip(*[(p, ok) for ok, p in found], strict=True))
            rows.append({"from": low, "models": len(found), "told": round(told, 3), "right": round(true, 3)})
    return rows


def pairs(families: Sequence[Family], temp: Path) -> dict[str, Any]:
    """Pairs of models of one tree and of two, by the correlation of their samples."""
    weights = [(n, weights_of(facts_of(k.model, temp).tensors.values())) for n, f in enumerate(families) for k in f]
    same, other = [], []
    for (tree, a), (tree_b, b) in combinations(weights, 2):
        (same if tree == tree_b else other).append(a.correlation(b) or 0.0)
    return {
        "one_tree": len(same), "two_trees": len(other),
        "auroc": float(roc_auc_score([1] * len(same) + [0] * len(other), same + other)),
        "weakest_of_one": min(same), "strongest_of_two": max(other),
        "false_positives": sum(c >= RELATED for c in other), "missed": sum(c < RELATED for c in same),
    }  # fmt: skip


def measure(families: Sequence[Family], temp: Path) -> dict[str, dict[str, Any]]:
    """A row for each method."""
    rows = {}
    for name, method in METHODS.items():
        started = time.perf_counter()
        answers = [method(family, temp / f"{name}-{number}") for number, family in enumerate(families)]
        seconds = (time.perf_counter() - started) / sum(map(len, families))
        rows[name] = {**count(families, answers), "seconds": seconds}
        click.echo(json.dumps({name: rows[name]}), err=True)
    return rows


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--quick", is_flag=True, help="Two small trees of classifiers alone.")
@click.option("--seed", default=1, show_default=True, help="Of the trees; the probabilities were fitted on seed 0.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def heritage(folder: Path, quick: bool, seed: int, as_json: bool) -> None:
    """Parents, merges and their weights in grown trees, against two other methods."""
    folder = folder.resolve()
    size = Size(fine_tunes=3, letters=200, base_steps=30) if quick else Size()
    zoos = {"classifiers": classifiers(folder / f"classifiers-{seed}", 2 if quick else 16, seed, size)}
    found: dict[str, Any] = {"pairs": pairs(zoos["classifiers"], folder / "temp")}
    click.echo(json.dumps(found), err=True)
    found["classifiers"] = measure(zoos["classifiers"], folder / "temp/classifiers")
    if not quick:
        zoos["UNets"] = list(unets(folder, (0, 1)))
        found["UNets"] = measure(zoos["UNets"], folder / "temp/UNets")
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for zoo in zoos:
        table = Table("method", "edges", "roots", "merges", "false merges", "weight error", "ms a model", title=zoo)
        for name, row in found[zoo].items():
            error = row["largest_weight_error"]
            table.add_row(
                name, f"{row['edges']:.3f} of {row['of']}", f"{row['roots']} of {len(zoos[zoo])}",
                f"{row['merges_called']} of {row['merges']}", str(row["false_merges"]),
                "" if error is None else f"{error:.1e}", f"{1000 * row['seconds']:.1f}",
            )  # fmt: skip
        Console(width=120).print(table)
    click.echo(json.dumps(found["pairs"], indent=2))
