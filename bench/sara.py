"""Sparse adapters beside LoRAs: `python bench/sara.py FOLDER [--quick] [--json]`.

On the zoo's base concepts are trained one by one with their own words ("a picture of sks whale"), 120 steps each, as
LoRAs and as sparse adapters (SaRA), and kept in FOLDER, where a second run finds them. Each kind has the learning rate
that did best among two to four on a cat.

    LoRA 4          rank 4, on the attention layers and those of the residual blocks that take time and text in
    SaRA .2         the fifth of all weights that is smallest
    LoRA, as SaRA   a LoRA of about as many bytes as SaRA .2; its rank is in `kind`
    SaRA, as LoRA   a sparse adapter of about as many bytes as LoRA 4

Columns, means over the concepts:

    trained   share of the base's weights, or of as many numbers
    kB        the file
    gain      1 − L / L_0 on noised drawings of the concept under its own words, L being the error
    drawn     pictures sampled under the words whose nearest training drawing (in latents) is of the concept
    drift     ‖v − v_0‖² / ‖v_0‖² under words of other things

Of merges of neighbouring concepts, two by two, `kept`, `fit`, `drawn` and `drift` are those of bench/concepts.py. The
last lines cut a full fine-tune and a SaRA fine-tune with `merge --method sara`: the energy that is inside.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch
from concepts import (
    PICTURES,
    UNRELATED,
    ZOO,
    Network,
    gallery_of,
    judge,
    prompt_of,
    recognised,
    squared,
    subjects,
)
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from modelgrove_analyzers.zoo.base import v_errors
from modelgrove_analyzers.zoo.base_folder import ZooBase, open_base
from modelgrove_analyzers.zoo.concepts import choose_concepts, find_concept
from modelgrove_analyzers.zoo.export import Convention, Label, write_lora
from modelgrove_analyzers.zoo.loras import Feed, learning_rate, target_modules, train_loras
from modelgrove_analyzers.zoo.pictures import PictureSet
from modelgrove_analyzers.zoo.recipes import Method, Recipe
from modelgrove_analyzers.zoo.sara import train_sara
from modelgrove_hub.plugins import get_plugin
from modelgrove_hub.search.text import token_states
from modelgrove_hub.testing import FolderModel, run_plugin

STEPS, CONCEPTS = 120, 3
LORA_RATE, WIDE_RATE, SARA_RATE, FEW_RATE = 1.2e-2, 2e-3, 3e-3, 1e-2
"""Learning rates of small and large LoRAs, and of sparse adapters of many and of few weights."""
MERGES = (("LoRA 4", "sum"), ("LoRA 4", "orthogonal"), ("SaRA .2", "sum"), ("SaRA .2", "ties"), ("SaRA .2", "dare"))


def recipe_of(name: str, steps: int, rank: int, rate: float, pictures: PictureSet, method: Method) -> Recipe:
    rows = tuple(find_concept(name).rows(pictures)[:12])
    return Recipe(
        concept=name, seed=0, rank=rank, alpha=float(rank), learning_rate=rate, steps=steps, pictures=rows, artists=(),
        prompt=prompt_of(name), method=method,
    )  # fmt: skip


def grown(
    folder: Path, names: Sequence[str], base: ZooBase, pictures: PictureSet, steps: int, *, rate: float,
    rank: int = 4, share: float = 0.0,
) -> dict[str, Path]:  # fmt: skip
    """The adapters of the concepts, trained where they are not there: sparse with a share, else LoRAs."""
    found = {}
    for name in names:
        stem = f"{f'sara-{share:g}' if share else f'lora-{rank}'}-{rate:g}-{name.replace(' ', '-')}"
        if not (folder / stem).exists():
            click.echo(f"training {stem}", err=True)
            recipe = recipe_of(name, steps, rank, rate, pictures, Method.SARA if share else Method.LORA)
            trained = train_sara(base, pictures, recipe, share) if share else train_loras(base, pictures, [recipe])[0]
            write_lora(trained, find_concept(name), Label(stem, Convention.DIFFUSERS, documented=True), folder)
        found[name] = folder / stem
    return found


def size_of(paths: Mapping[str, Path]) -> float:
    """Mean bytes of the weight files."""
    return mean(file.stat().st_size for path in paths.values() for file in path.glob("*.safetensors"))


def alone(
    kind: str, paths: Mapping[str, Path], trained: float, network: Network, pictures: PictureSet,
    gallery: tuple[torch.Tensor, list[str]],
) -> dict[str, Any]:  # fmt: skip
    gains, drawn, drifts = [], [], []
    people = subjects(paths, network, pictures)
    for subject in people:
        noisy, times, right = subject.questions
        gains.append(1 - squared(subject.alone - right) / squared(subject.base - right))
        before = [network.answer(noisy, times, prompt) for prompt in UNRELATED]
        with network.wearing(subject.model):
            drawn.append(recognised(network.sample(subject.prompt, PICTURES), subject.name, gallery))
            after = [network.answer(noisy, times, prompt) for prompt in UNRELATED]
        change = sum(squared(a - b) for a, b in zip(after, before, strict=True))
        drifts.append(change / sum(map(squared, before)))
    row = {"kind": kind, "trained": trained, "kB": size_of(paths) / 1000}
    return row | {"gain": mean(gains), "drawn": mean(drawn), "drift": mean(drifts)}


def pairs(
    kind: str, method: str, paths: Mapping[str, Path], network: Network, pictures: PictureSet,
    gallery: tuple[torch.Tensor, list[str]],
) -> dict[str, Any]:  # fmt: skip
    people, rows, sizes = subjects(paths, network, pictures), [], []
    for two in pairwise(people):
        with tempfile.TemporaryDirectory() as place:
            models = [subject.model for subject in two]
            run_plugin(get_plugin(f"merger.{method}")(), models, Path(place) / "job", {"seed": 0})
            merged = FolderModel(Path(place) / "job/out", name=method, adapter_type="adapter")
            rows.append(judge(merged, list(two), network, gallery))
            sizes.append(sum(file.stat().st_size for file in merged.files().values()))
    row = {"kind": kind, "method": method, "kB": mean(sizes) / 1000}
    return row | {key: mean(one[key] for one in rows) for key in ("kept", "fit", "drawn", "drift")}


def fine_tuned(base: ZooBase, pictures: PictureSet, name: str, steps: int) -> dict[str, torch.Tensor]:
    """All weights trained by Adam, as SaRA is not."""
    recipe = recipe_of(name, steps, 4, 1e-3, pictures, Method.LORA)
    before = {key: tensor.clone() for key, tensor in base.unet.state_dict().items()}
    base.unet.requires_grad_(True)
    optimizer = torch.optim.Adam(base.unet.parameters())
    feed, states = Feed(base, pictures, recipe), token_states([recipe.prompt]).expand(recipe.batch, -1, -1)
    for step in range(steps):
        latents, times, epsilon = feed.draw()
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, step)
        optimizer.zero_grad()
        v_errors(base.unet, base.noise, latents, states, times, epsilon).mean().backward()
        optimizer.step()
    after = {key: tensor.clone() for key, tensor in base.unet.state_dict().items()}
    base.unet.load_state_dict(before)
    base.unet.requires_grad_(False)
    return after


def cuts(base: ZooBase, pictures: PictureSet, name: str, sparse: Path, steps: int) -> list[dict[str, Any]]:
    """What `merge --method sara` keeps of a full fine-tune, and of the base with a sparse adapter baked in."""
    origin = FolderModel(ZOO / "zoo-base", name="zoo-base")
    rows = []
    with tempfile.TemporaryDirectory() as text:
        place = Path(text)
        (place / "full/unet").mkdir(parents=True)
        weights = fine_tuned(base, pictures, name, steps)
        save_file({k: w.half() for k, w in weights.items()}, place / "full/unet/diffusion_pytorch_model.safetensors")
        shutil.copytree(ZOO / "zoo-base/codec", place / "full/codec")
        adapter = FolderModel(sparse, name="sparse", adapter_type="sara")
        run_plugin(get_plugin("merger.sum")(), [adapter, origin], place / "baked", {"base": True})
        tuned = {"full fine-tune": place / "full", "SaRA .2, baked": place / "baked/out"}
        for number, (kind, folder) in enumerate(tuned.items()):
            result = run_plugin(
                get_plugin("merger.sara")(), [FolderModel(folder, name=kind), origin], place / f"cut-{number}",
                {"base": True, "share": 0.2},
            )  # fmt: skip
            rows.append({"kind": kind, **{key: result.report[key] for key in ("energy_kept", "changed", "bytes")}})
    return rows


def shown(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    return table


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--quick", is_flag=True, help="Two concepts, few steps.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def main(folder: Path, quick: bool, as_json: bool) -> None:
    """Train concepts as sparse adapters and as LoRAs, and see what each learns."""
    steps = 4 if quick else STEPS
    folder = folder / ("quick" if quick else "full")
    folder.mkdir(parents=True, exist_ok=True)
    base, pictures = open_base(ZOO / "zoo-base"), PictureSet.load(ZOO)
    network, names = Network(base), choose_concepts(2 if quick else CONCEPTS, held_out=False)
    total = sum(p.numel() for p in base.unet.parameters())
    width = sum(sum(layer.weight.shape) for layer in target_modules(base.unet).values())
    lora = grown(folder, names, base, pictures, steps, rate=LORA_RATE)
    sparse = grown(folder, names, base, pictures, steps, rate=SARA_RATE, share=0.2)
    rank = round(size_of(sparse) / (2 * width))
    tiny = float(f"{size_of(lora) / 6 / total:.1g}")  # four bytes for a place and two for its value
    kinds = {
        "LoRA 4": (lora, 4 * width / total),
        "SaRA, as LoRA": (grown(folder, names, base, pictures, steps, rate=FEW_RATE, share=tiny), tiny),
        "SaRA .2": (sparse, 0.2),
        f"LoRA {rank}, as SaRA": (
            grown(folder, names, base, pictures, steps, rank=rank, rate=WIDE_RATE), rank * width / total
        ),
    }  # fmt: skip
    gallery = gallery_of(names, network, pictures)
    results = {
        "alone": [alone(kind, *found, network, pictures, gallery) for kind, found in kinds.items()],
        "merged": [pairs(kind, method, kinds[kind][0], network, pictures, gallery) for kind, method in MERGES],
        "cut": cuts(base, pictures, names[0], sparse[names[0]], steps),
    }
    if as_json:
        click.echo(json.dumps({"load": os.getloadavg()[0], "concepts": names, **results}, indent=2))
        return
    for rows in results.values():
        Console(width=110).print(shown(rows))


if __name__ == "__main__":
    main()
