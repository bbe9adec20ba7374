"""What merged concepts keep: `python bench/concepts.py FOLDER [--quick] [--json] [--method NAME]`.

LoRAs of rank 4 are trained on the zoo's base, one concept each with its own words ("a picture of sks whale"), and kept
in FOLDER, where a second run finds them. 2, 4, 8 and 16 are merged by the real plugins at weights of one (`sum 0.6` at
the 0.6 of Orthogonal Adaptation; `mean` at 1/N) and the merged adapter is put on the base again. Three kinds:

    distinct    concepts spread over all groups
    related     concepts of one group (animals)
    orthogonal  the distinct concepts, trained in columns of a shared basis that the hub would hand out

Columns, means over the merged concepts:

    kept        1 − ‖v_m − v_i‖² / ‖v_0 − v_i‖² on noised drawings of concept i under its own words: v_i is the answer
                of adapter i alone, v_0 that of the base. 1: as if alone, 0: as the base, below: worse than without
    worst       the least of them
    fit         the same of what training lowers: (L_0 − L_m) / (L_0 − L_i), L being the error on the drawings
    drawn       pictures sampled under i's words whose nearest training drawing (in latents) is of concept i
    drift       ‖v_m − v_0‖² / ‖v_0‖² under words of other things

The last lines compare what `merge --plan` says of 240 ordered pairs with the damage that was measured: Spearman's
correlation, from weights and as the base answers, and the curve from crosstalk to damage that verdicts are made of.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch
from diffusers import DPMSolverMultistepScheduler
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor

import modelgrove_analyzers
from modelgrove_analyzers.zoo.base import draw_noise, to_pixels
from modelgrove_analyzers.zoo.base_folder import ZooBase, open_base
from modelgrove_analyzers.zoo.concepts import choose_concepts, find_concept, load_concepts
from modelgrove_analyzers.zoo.export import Convention, Label, write_lora
from modelgrove_analyzers.zoo.loras import train_loras
from modelgrove_analyzers.zoo.pictures import PictureSet
from modelgrove_analyzers.zoo.recipes import Method, Recipe
from modelgrove_hub.formats.adapters import Factors
from modelgrove_hub.formats.shared_basis import BasisColumns
from modelgrove_hub.formats.updates import open_updates
from modelgrove_hub.plugins import get_plugin
from modelgrove_hub.search.text import token_states
from modelgrove_hub.testing import FolderModel, run_plugin

ZOO = Path(modelgrove_analyzers.__file__).parent / "zoo/data"
RANK, STEPS, RATE = 4, 120, 6e-3
SIZES = (2, 4, 8, 16)
KINDS = ("distinct", "related", "orthogonal")
RELATED = "animals"
METHODS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "sum": ("sum", {}),
    "sum 0.6": ("sum", {"scale": 0.6}),
    "mean": ("sum", {"scale": None}),
    "legacy-linear": ("legacy-linear", {}),
    "ties": ("ties", {}),
    "ties full": ("ties", {"space": "full"}),
    "dare": ("dare", {}),
    "dare full": ("dare", {"space": "full"}),
    "della full": ("della", {"space": "full"}),
    "model-stock": ("model-stock", {}),
    "knots": ("knots", {}),
    "tsv": ("tsv", {}),
    "iso-c": ("iso-c", {}),
    "regmean": ("regmean", {}),
    "projection": ("orthogonal", {"repair": "projection"}),
    "sequential": ("orthogonal", {"repair": "sequential"}),
    "output": ("orthogonal", {"repair": "output"}),
    "soft": ("orthogonal", {"repair": "soft"}),
    "soft 0.6": ("orthogonal", {"repair": "soft", "scale": 0.6}),
}
UNRELATED = ("a picture of a red flag", "a picture of a wooden chair", "a picture of soup", "a picture of a street")
DRAWS, PICTURES = 16, 4


@dataclass
class Subject:
    """A concept, its LoRA, and what both answer to the same questions."""

    name: str
    prompt: str
    model: FolderModel
    questions: tuple[Tensor, Tensor, Tensor]
    """Noised latents, timesteps, and the v that would be right."""
    base: Tensor
    alone: Tensor


class Network:
    """The zoo's UNet with adapters on and off."""

    def __init__(self, base: ZooBase) -> None:
        self.base = base
        self.layers = dict(base.unet.named_modules())
        self.states = {}

    @contextmanager
    def wearing(self, model: FolderModel | None) -> Iterator[None]:
        """The weights with an adapter added while the context lasts."""
        kept = {}
        for name, update in (open_updates(model).targets if model else {}).items():
            weight = self.layers[update.module].get_parameter(update.parameter).data
            kept[name] = (weight, weight.clone())
            found = update.read()
            weight += (found.up @ found.down if isinstance(found, Factors) else found).reshape(weight.shape)
        try:
            yield
        finally:
            for weight, before in kept.values():
                weight.copy_(before)

    @torch.inference_mode()
    def answer(self, latents: Tensor, times: Tensor, prompt: str) -> Tensor:
        """v of every latent under one prompt."""
        return self.base.unet(latents, times, self.state(prompt).expand(len(latents), -1, -1)).sample

    def state(self, prompt: str) -> Tensor:
        if prompt not in self.states:
            self.states[prompt] = token_states([prompt])
        return self.states[prompt]

    @torch.inference_mode()
    def sample(self, prompt: str, count: int) -> Tensor:
        """Latents painted in eight steps with guidance 2."""
        unet, solver = (
            self.base.unet,
            DPMSolverMultistepScheduler.from_config(self.base.noise.config, timestep_spacing="trailing"),
        )
        solver.set_timesteps(8)
        side = unet.config.sample_size
        latents = torch.randn(count, unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(7))
        both = torch.cat([self.state("").expand(count, -1, -1), self.state(prompt).expand(count, -1, -1)])
        for time in solver.timesteps:
            plain, wanted = unet(torch.cat([latents, latents]), time, both).sample.chunk(2)
            latents = solver.step(plain + 2 * (wanted - plain), time, latents).prev_sample
        return latents


def trained(folder: Path, kind: str, names: Sequence[str], base: ZooBase, pictures: PictureSet) -> dict[str, Path]:
    """The LoRAs of these concepts, trained if they are not there."""
    found = {}
    for place, name in enumerate(names):
        stem = f"{kind}-{name.replace(' ', '-')}"
        path = folder / stem
        if not path.exists():
            click.echo(f"training {stem}", err=True)
            columns = BasisColumns("zoo", 0, RANK * place, RANK) if kind == "orthogonal" else None
            rows = find_concept(name).rows(pictures)[:12]
            recipe = Recipe(
                concept=name, seed=place, rank=RANK, alpha=float(RANK), learning_rate=RATE, steps=STEPS,
                pictures=tuple(rows), artists=(), prompt=prompt_of(name), columns=columns,
                method=Method.ORTHOGONAL if columns else Method.LORA,
            )  # fmt: skip
            (lora,) = train_loras(base, pictures, [recipe])
            write_lora(lora, find_concept(name), Label(stem, Convention.DIFFUSERS, documented=True), folder)
        found[name] = path
    return found


def prompt_of(name: str) -> str:
    return f"a picture of sks {name}"


def subjects(paths: Mapping[str, Path], network: Network, pictures: PictureSet) -> list[Subject]:
    made = []
    for number, (name, path) in enumerate(paths.items()):
        base = FolderModel(ZOO / "zoo-base", name="zoo-base")  # regmean watches it paint
        model, prompt = FolderModel(path, name=path.name, adapter_type="lora", base=base), prompt_of(name)
        generator = torch.Generator().manual_seed(1000 + number)
        rows = find_concept(name).rows(pictures)[:12]
        chosen = torch.randint(len(rows), (DRAWS,), generator=generator)
        clean = network.base.codec.encode(to_pixels(pictures.pixels[rows])[chosen])
        times, noise = draw_noise(clean.shape, generator)
        noisy = network.base.noise.add_noise(clean, noise, times)
        right = network.base.noise.get_velocity(clean, noise, times)
        without = network.answer(noisy, times, prompt)
        with network.wearing(model):
            alone = network.answer(noisy, times, prompt)
        made.append(Subject(name, prompt, model, (noisy, times, right), without, alone))
    return made


def merged(method: str, models: Sequence[FolderModel], folder: Path) -> FolderModel:
    plugin, given = METHODS[method]
    params = dict(given)
    scale = params.pop("scale", 1.0)
    weight = 1 / len(models) if scale is None else scale
    run_plugin(
        get_plugin(f"merger.{plugin}")(), models, folder, params | {"weights": [weight] * len(models), "seed": 0}
    )
    return FolderModel(folder / "out", name=method, adapter_type="lora")


def judge(
    model: FolderModel, chosen: Sequence[Subject], network: Network, gallery: tuple[Tensor, list[str]]
) -> dict[str, float]:
    kept, fit, drawn = [], [], []
    with network.wearing(model):
        for subject in chosen:
            noisy, times, right = subject.questions
            found = network.answer(noisy, times, subject.prompt)
            kept.append(1 - squared(found - subject.alone) / squared(subject.base - subject.alone))
            gain = squared(subject.base - right) - squared(subject.alone - right)
            fit.append((squared(subject.base - right) - squared(found - right)) / gain)
            drawn.append(recognised(network.sample(subject.prompt, PICTURES), subject.name, gallery))
        noisy, times, _ = chosen[0].questions
        after = [network.answer(noisy, times, prompt) for prompt in UNRELATED]
    before = [network.answer(noisy, times, prompt) for prompt in UNRELATED]
    drift = sum(squared(a - b) for a, b in zip(after, before, strict=True)) / sum(map(squared, before))
    return {"kept": mean(kept), "worst": min(kept), "fit": mean(fit), "drawn": mean(drawn), "drift": drift}


def squared(values: Tensor) -> float:
    return float(values.double().square().sum())


def recognised(latents: Tensor, name: str, gallery: tuple[Tensor, list[str]]) -> float:
    drawings, names = gallery
    nearest = torch.cdist(latents.flatten(1), drawings).argmin(1)
    return sum(names[place] == name for place in nearest.tolist()) / len(nearest)


def gallery_of(names: Sequence[str], network: Network, pictures: PictureSet) -> tuple[Tensor, list[str]]:
    rows = [(row, name) for name in names for row in find_concept(name).rows(pictures)[:12]]
    latents = network.base.codec.encode(to_pixels(pictures.pixels[[row for row, _ in rows]]))
    return latents.flatten(1), [name for _, name in rows]


def agreement(chosen: Sequence[Subject], network: Network, folder: Path) -> dict[str, Any]:
    """How the plan's measures rank the damage that one adapter does to another's own answers, and what they mean.

    `curve`: fifths of the pairs by crosstalk from weights, its mean and that of the damage in each (merge/verdicts.py).
    """
    base = FolderModel(ZOO / "zoo-base", name="zoo-base")
    models = [subject.model for subject in chosen]
    report = run_plugin(get_plugin("analyzer.crosstalk")(), [*models, base], folder / "plan", {"base": True}).report
    by_name = {subject.model.name: subject for subject in chosen}
    said: dict[str, list[float]] = {"weights": [], "asked": []}
    measured = []
    for number, pair in enumerate(report["pairs"]):
        both = merged("sum", [by_name[pair["a"]].model, by_name[pair["b"]].model], folder / f"pair-{number}")
        for one, key in (("a", "b_on_a"), ("b", "a_on_b")):
            subject = by_name[pair[one]]
            with network.wearing(both):
                found = network.answer(*subject.questions[:2], subject.prompt)
            measured.append((squared(found - subject.alone) / squared(subject.alone - subject.base)) ** 0.5)
            said["weights"].append(pair[f"crosstalk_of_{key}"])
            said["asked"].append(pair[f"damage_of_{key}"])
    ordered = sorted(zip(said["weights"], measured, strict=True))
    fifths = [ordered[place * len(ordered) // 5 : (place + 1) * len(ordered) // 5] for place in range(5)]
    return {
        **{name: float(spearmanr(values, measured).statistic) for name, values in said.items()},
        "curve": [[round(mean(column), 2) for column in zip(*fifth, strict=True)] for fifth in fifths if fifth],
    }


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    made = Table("kind", "N", "method", "kept", "worst", "fit", "drawn", "drift")
    for row in rows:
        numbers = [f"{row[key]:.2f}" for key in ("kept", "worst", "fit", "drawn")]
        made.add_row(row["kind"], str(row["n"]), row["method"], *numbers, f"{row['drift']:.3f}")
    return made


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--quick", is_flag=True, help="Two concepts, three methods.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHODS)), help="Only this one; repeatable.")
@click.option("--kind", "chosen", multiple=True, type=click.Choice(KINDS), help="Only this one; repeatable.")
def main(folder: Path, quick: bool, as_json: bool, methods: tuple[str, ...], chosen: tuple[str, ...]) -> None:
    """Merge concepts and see what is left of each."""
    folder.mkdir(parents=True, exist_ok=True)
    base, pictures = open_base(ZOO / "zoo-base"), PictureSet.load(ZOO)
    network = Network(base)
    sizes = SIZES[:1] if quick else SIZES
    distinct = choose_concepts(max(sizes), held_out=False)
    related = [concept.name for concept in load_concepts().values() if concept.group == RELATED][: max(sizes)]
    names_of = {"distinct": distinct, "related": related, "orthogonal": distinct}
    kinds = {kind: names_of[kind] for kind in (("distinct",) if quick else chosen or KINDS)}
    wanted = methods or (("sum", "ties", "projection") if quick else tuple(METHODS))
    rows, ranks = [], {}
    for kind, names in kinds.items():
        people = subjects(trained(folder, kind, names, base, pictures), network, pictures)
        gallery = gallery_of(names, network, pictures)
        # What each does alone: the most that a merge can keep.
        alone = [judge(subject.model, [subject], network, gallery) for subject in people]
        rows.append(
            {"kind": kind, "n": 1, "method": "alone", **{key: mean(row[key] for row in alone) for key in alone[0]}}
        )
        for size in (size for size in sizes if size <= len(names)):
            for method in wanted:
                with tempfile.TemporaryDirectory() as place:
                    model = merged(method, [subject.model for subject in people[:size]], Path(place) / "job")
                    found = judge(model, people[:size], network, gallery)
                rows.append({"kind": kind, "n": size, "method": method, **found})
                click.echo(json.dumps(rows[-1]), err=True)  # a run that is stopped has not been for nothing
        if kind == "distinct" and not methods:
            with tempfile.TemporaryDirectory() as place:
                ranks = agreement(people, network, Path(place))
    if as_json:
        click.echo(json.dumps({"load": os.getloadavg()[0], "results": rows, "agreement": ranks}, indent=2))
        return
    Console(width=110).print(table(rows))
    for name, value in ranks.items():
        click.echo(f"the damage and what the plan says, {name}: {value}")


if __name__ == "__main__":
    main()
