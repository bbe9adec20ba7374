"""What claims about weights survive: each part attacks, and counts what is still shown, and at what price.

    python bench/trust.py mark FOLDER
    python bench/trust.py bits FOLDER
    python bench/trust.py cost
    python bench/trust.py heritage FOLDER
    python bench/trust.py scanners --peers VENV

**mark**: the white-box weight mark, 128 bits, in the zoo's base and in one of its LoRAs. A row for every attack:

    as it is    bits that agree (of 128), read from the attacked model alone
    difference  the same of what differs from the unmarked original, hidden units put into its order
    weakest     the weakest bit of the better of the two, in standard deviations of unmarked weights; wrong below 0
    log10 p     exact, of the better of the two, times what was tried (two views, two polarities)
    change      ‖W' − W‖ / ‖W‖ from the model before, of all float tensors
    loss        denoising loss of the attacked model, lower is better: of the base on 41 drawings that nothing trained
                on; of the LoRA, in its base, on the drawings that it learned

Then the false positives: wrong keys looked for in one of the LoRA's products, and the key looked for in models that
know nothing of it.

**bits**: how many agree after attacks on marks of 32 to 256 bits, all with a margin of 4; `needed` are those that are
enough at 10⁻⁶ in either polarity.

**cost**: `modelgrove mark` and `verify` on a checkpoint of SDXL's shapes (2.57 billion parameters, fp16, 5.1 GB):
seconds on the clock (`s`), of the processor (`cpu_s`), and the largest memory of the process (`peak_mb`).

**heritage**: who came from whom; see `heritage.py`.

**scanners**: pickles made to hurt, and plain weights as trainers pickle them (`tests/hub/pickled.py`), shown to what
decides about conversion here and to the scanners in VENV (`python -m venv VENV && VENV/bin/pip install picklescan
modelscan fickling typing_extensions`):

    calls     hostile files that are flagged, of those that import what weights do not need
    others    the same of archives that two readers see differently, or that hide something, and of absurd sizes: most
              scanners look at imports alone and do not claim to see these
    clean     hostile files that are called clean
    error     hostile files without a verdict: skipped, an exception, more than 30 seconds or 4 GB
    wrong     plain weights that are not called clean; none is right
    ms        a file, the scan alone, in a process that has everything imported
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from heritage import heritage
from PIL import Image
from rich.console import Console
from rich.table import Table

import modelgrove_analyzers
from modelgrove_analyzers.zoo.base import BaseRecipe, BaseTrainer, is_base_picture
from modelgrove_analyzers.zoo.base_folder import ZooBase, write_base
from modelgrove_analyzers.zoo.pictures import PictureSet
from modelgrove_hub.errors import UnsafeFileError
from modelgrove_hub.hub import Hub
from modelgrove_hub.keys import find_key, list_keys, new_key, read_secret
from modelgrove_hub.plugins import get_plugin
from modelgrove_hub.settings import settings
from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_kernels.weight_mark import Carriers, MarkKey, Reading, signs, statistic_of, tail, threshold
from modelgrove_migrations.run import upgrade
from modelgrove_plugins.verify.reading import matrices_of

ZOO = Path(modelgrove_analyzers.__file__).parent / "zoo/data"
LORA, OTHER = "whale-e07bb677", "crown-9e1f1047"
TESTED, TUNED = 41, 64
STRANGER_STEPS, TUNING_STEPS = 20, 30
WRONG_KEYS, LEVELS = 100_000, (0.05, 1e-2, 1e-3, 1e-4, 1e-6)
BITS = 128
HARD: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "base": {
        "int2": {"kind": "quantize", "bits": 2}, "prune 90%": {"kind": "prune", "sparsity": 0.9},
        "prune 98%": {"kind": "prune", "sparsity": 0.98},
    },
    "LoRA": {
        "int2": {"kind": "quantize", "bits": 2}, "prune 90%": {"kind": "prune", "sparsity": 0.9},
        "rank 1": {"kind": "svd", "rank": 1},
    },
}  # fmt: skip
"""Attacks on marks of other lengths."""


@dataclass
class World:
    """A hub with keys, and plugins to run in folders of their own."""

    folder: Path
    keys: Mapping[str, str]
    secret: MarkKey
    unmarked: FolderModel
    count: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def run(self, plugin: str, *models: FolderModel, **params: Any) -> tuple[FolderModel, dict[str, Any]]:
        """What a plugin writes, and its report."""
        self.count += 1
        place = self.folder / f"{self.count:03d}-{plugin}"
        report = run_plugin(get_plugin(plugin)(), models, place, params).report
        first = models[0]
        kind = None if params.get("base") else first.adapter_type
        made = place / "out"
        whole = any(made.iterdir())
        return FolderModel(made, name=place.name, family="zoo", adapter_type=kind) if whole else first, dict(report)

    def verify(self, model: FolderModel, reference: FolderModel | None = None) -> dict[str, Any]:
        """The report on a model; of checkpoints with the unmarked original unless another reference is given."""
        inputs = [model] if model.adapter_type else [model, reference or self.unmarked]
        return self.run(
            "verifier.weight-mark", *inputs, key=self.keys["ours"], reference=len(inputs) > 1, users=1, tries=1,
            controls=1,
        )[1]  # fmt: skip

    def row(self, what: str, attack: str, model: FolderModel, change: float | None, loss: float | None) -> None:
        """Measure one attack, and tell it at once."""
        report = self.verify(model)
        views = [report["views"].get(view) for view in ("as it is", "difference from the reference")]
        best = report["views"][report["view"]]
        self.rows.append(
            {
                "what": what, "attack": attack, "as_it_is": views[0]["agreeing"],
                "difference": views[1]["agreeing"] if views[1] else None, "weakest": best["weakest_bit"],
                "log10_p": report["log10_corrected_p"], "change": change, "loss": loss,
                "inverted": best["inverted"],
            }
        )  # fmt: skip
        click.echo(json.dumps(self.rows[-1]), err=True)


def opened(folder: Path) -> World:
    """A new hub in the folder."""
    os.environ["MODELGROVE_HOME"] = str(folder / "home")
    settings.cache_clear()
    hub = Hub.open()
    upgrade(hub.settings.database)
    with hub.transaction() as session:
        known = {key.name for key in list_keys(session)}
        for name in {"ours", "second"} - known:
            new_key(session, hub.settings, name)
    with hub.reading() as session:
        ours = find_key(session, "ours")
        keys = {key.name: key.id for key in list_keys(session)}
        secret = MarkKey(read_secret(hub.settings, ours), ours.bits)
    hub.engine.dispose()
    runs = folder / "runs" / str(len(list((folder / "runs").glob("*"))) if (folder / "runs").exists() else 0)
    return World(runs, keys, secret, FolderModel(ZOO / "zoo-base", name="zoo-base", family="zoo"))


def drawn(folder: Path, pictures: PictureSet, rows: Sequence[tuple[int, str]]) -> str:
    """Drawings with their captions, as trainers keep them."""
    folder.mkdir(parents=True, exist_ok=True)
    for row, caption in rows:
        Image.fromarray(pictures.pixels[row]).save(folder / f"{row}.png")
        (folder / f"{row}.txt").write_text(caption, "utf-8")
    return str(folder)


def stranger(folder: Path, pictures: PictureSet, steps: int) -> FolderModel:
    """A network of the same form from another random start, trained for a while."""
    place = folder / f"stranger-{steps}"
    if not place.exists():
        recipe = BaseRecipe(steps=steps, warmup=20, decay=0.5, checkpoint_every=steps, seed=7)
        trainer = BaseTrainer(pictures, folder / f"training-{steps}", recipe)
        trainer.run()
        write_base(ZooBase(trainer.unet, trainer.noise, trainer.codec), {}, place)
    return FolderModel(place, name="stranger", family="zoo")


def base_part(world: World, folder: Path, pictures: PictureSet, quick: bool) -> Iterator[FolderModel]:
    """Attacks on the base; yields models that know nothing of the key."""
    drawings = list(enumerate(pictures.pictures))
    unseen = [(row, one.caption) for row, one in drawings if row % 30 == 7 and is_base_picture(0, one)]
    flags = [(row, one.label) for row, one in drawings if one.group == "flags"]
    test = drawn(world.folder / "test", pictures, unseen[: 6 if quick else TESTED])
    new_task = drawn(world.folder / "flags", pictures, flags[:TUNED])
    same_task = drawn(
        world.folder / "same", pictures, [(row, pictures.pictures[row].caption) for row in range(0, 640, 10)]
    )

    def loss(model: FolderModel) -> float:
        report = world.run("analyzer.denoising-loss", model, pictures=test, seed=1)[1]
        return float(report["models"][0]["score"])

    def attack(name: str, *models: FolderModel, **params: Any) -> FolderModel:
        made, report = world.run("editor.attack", *models, **params)
        world.row("base", name, made, report["change"], loss(made))
        return made

    world.row("base", "(unmarked)", world.unmarked, None, loss(world.unmarked))
    marked, report = world.run("editor.weight-mark", world.unmarked, key=world.keys["ours"], fidelity=False)
    world.row("base", "none", marked, report["change"]["relative"], loss(marked))
    for bits in (4,) if quick else (8, 4, 3, 2):
        attack(f"int{bits}", marked, kind="quantize", bits=bits)
    for share in (0.7,) if quick else (0.3, 0.5, 0.7, 0.9):
        attack(f"prune {share:.0%}", marked, kind="prune", sparsity=share)
    steps = 4 if quick else TUNING_STEPS
    tunes = [("same task", same_task, 1e-4), ("new task", new_task, 1e-4), ("new task, hard", new_task, 2e-3)]
    for name, shown, rate in tunes[1:2] if quick else tunes:
        attack(f"fine-tune {steps}, {name}", marked, kind="fine-tune", pictures=shown, steps=steps, rate=rate)
    moved = attack("permute", marked, kind="permute")
    attack("permute, rescale ×4", moved, kind="rescale")
    if quick:
        return
    other = stranger(folder, pictures, STRANGER_STEPS)
    yield other
    attack("merge 50/50 with a stranger", marked, other, kind="average")
    attack("overwrite, as strong", marked, kind="overwrite", key=world.keys["second"])
    attack("overwrite, three times as strong", marked, kind="overwrite", key=world.keys["second"], margin=12.0)
    copies = [
        world.run("editor.weight-mark", world.unmarked, key=world.keys[name], fidelity=False)[0]
        for name in sorted(world.keys)
    ]
    attack(f"average of {len(copies)} users' copies", *copies, kind="average")
    whole = attack("prune 50%, fine-tuned", attack("prune 50%", marked, kind="prune", sparsity=0.5), kind="fine-tune",
                   pictures=new_task, steps=TUNING_STEPS, rate=1e-4)  # fmt: skip
    whole = attack("… and permuted", whole, kind="permute")
    attack("… and int4", whole, kind="quantize", bits=4)


def lora_part(world: World, pictures: PictureSet, quick: bool) -> FolderModel:
    """Attacks on a LoRA; returns it unmarked."""
    facts = [json.loads(line) for line in (ZOO / "sample/truth.jsonl").read_text("utf-8").splitlines()]
    recipe = next(one for one in facts if one["name"] == LORA)["recipe"]
    own = drawn(world.folder / "own", pictures, [(row, recipe["prompt"]) for row in recipe["pictures"]])
    plain, other = (FolderModel(ZOO / "sample" / name, name=name, adapter_type="lora") for name in (LORA, OTHER))

    def loss(model: FolderModel) -> float:
        inputs = [model] if model.adapter_type is None else [model, world.unmarked]
        report = world.run("analyzer.denoising-loss", *inputs, pictures=own, seed=1, base=len(inputs) > 1)[1]
        return float(report["models"][0]["score"])

    def measured(name: str, plugin: str, *models: FolderModel, **params: Any) -> FolderModel:
        made, report = world.run(plugin, *models, **params)
        world.row("LoRA", name, made, report.get("change"), loss(made))
        return made

    world.row("LoRA", "(unmarked)", plain, None, loss(plain))
    marked, report = world.run("editor.weight-mark", plain, key=world.keys["ours"])
    world.row("LoRA", "none", marked, report["change"]["relative"], loss(marked))
    wishes: list[tuple[str, dict[str, Any]]] = [
        ("re-factored by SVD", {"kind": "svd"}), ("int4", {"kind": "quantize", "bits": 4}),
        ("int2", {"kind": "quantize", "bits": 2}), ("prune 50%", {"kind": "prune", "sparsity": 0.5}),
        ("prune 70%", {"kind": "prune", "sparsity": 0.7}), ("strength −1", {"kind": "rescale", "factor": -1.0}),
        ("rank 2 → 1", {"kind": "svd", "rank": 1}),
    ]  # fmt: skip
    for name, params in wishes[:2] if quick else wishes:
        measured(name, "editor.attack", marked, **params)
    merges = ("sum", "orthogonal", "ties", "dare")
    for method in merges[:1] if quick else merges:
        measured(f"merged with another, {method}", f"merger.{method}", marked, other)
    baked = measured("baked into the base", "merger.sum", marked, world.unmarked, base=True)
    measured("baked, int8", "editor.attack", baked, kind="quantize", bits=8)
    measured("baked, int4", "editor.attack", baked, kind="quantize", bits=4)
    return plain


def wrong_keys(plain: FolderModel, count: int) -> dict[str, Any]:
    """How often wrong keys reach what a level asks for, in one product of the LoRA, either polarity."""
    from modelgrove_kernels.lowrank import LowRank

    matrix = matrices_of(plain)[0]
    weight = matrix.read()
    assert isinstance(weight, LowRank)
    rows, columns = matrix.shape
    agreeing, batch = [], 500
    for start in range(0, count, batch):
        secrets = [hashlib.sha256(b"wrong %d" % number).digest() for number in range(start, min(count, start + batch))]
        left = signs(secrets, f"u\0{matrix.name}", matrix.shape, BITS, rows).flatten(0, 1)
        right = signs(secrets, f"v\0{matrix.name}", matrix.shape, BITS, columns).flatten(0, 1)
        read = torch.where(Carriers(left, right).correlations(weight) >= 0, 1.0, -1.0).view(-1, BITS)
        agreeing.append((read == signs(secrets, "message", (), 1, BITS)[:, 0]).sum(1))
        first = MarkKey(secrets[0])
        single = Reading.of(statistic_of(first, {matrix.name: weight}).values(), first.message()).agreeing
        assert single == int(agreeing[-1][0]), "the batch reads other bits than `verify`"
    both = torch.maximum(torch.cat(agreeing), BITS - torch.cat(agreeing))
    found = {}
    for level in LEVELS:
        least = threshold(BITS, level, 2)
        assert least is not None
        found[f"{level:g}"] = {"seen": int((both >= least).sum()), "expected": count * 2 * float(tail(BITS, least))}
    return {"keys": count, "most_bits": int(both.max()), "levels": found}


def independent(world: World, strangers: Sequence[FolderModel], quick: bool) -> dict[str, Any]:
    """The key in models that know nothing of it."""
    names = sorted({json.loads(line)["path"] for line in (ZOO / "sample/truth.jsonl").read_text("utf-8").splitlines()})
    loras = [
        FolderModel(ZOO / "sample" / name, name=name, adapter_type="lora") for name in names[: 5 if quick else None]
    ]
    readings = []
    for model in [world.unmarked, *strangers, *loras]:
        weights = {matrix.name: matrix.read() for matrix in matrices_of(model)}
        readings.append(Reading.of(statistic_of(world.secret, weights).values(), world.secret.message()))
    p = [float(one.p()) for one in readings]
    return {
        "models": len(p), "smallest_p": min(p), "p_below_0.05": sum(one <= 0.05 for one in p),
        "most_bits": max(one.strongest for one in readings),
    }  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    made = Table("what", "attack", "as it is", "difference", "weakest", "log10 p", "change", "loss")
    shown: Callable[[Any, str], str] = lambda value, form: "" if value is None else format(value, form)  # noqa: E731
    for row in rows:
        made.add_row(
            row["what"], row["attack"], shown(row["as_it_is"], "d"), shown(row["difference"], "d"),
            shown(row["weakest"], ".2f"), shown(row["log10_p"], ".1f"), shown(row["change"], ".2%"),
            shown(row["loss"], ".4f"),
        )  # fmt: skip
    return made


@click.group()
def main() -> None:
    """Parts of what is measured about claims; each takes a folder to keep trained models in."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--quick", is_flag=True, help="Few attacks, few drawings, few keys.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def mark(folder: Path, quick: bool, as_json: bool) -> None:
    """The white-box weight mark under attack."""
    folder.mkdir(parents=True, exist_ok=True)
    world, pictures = opened(folder.resolve()), PictureSet.load(ZOO)
    strangers = list(base_part(world, folder, pictures, quick))
    plain = lora_part(world, pictures, quick)
    false = {
        "wrong_keys": wrong_keys(plain, 1000 if quick else WRONG_KEYS),
        "independent_models": independent(world, strangers, quick),
    }
    if as_json:
        click.echo(json.dumps({"load": os.getloadavg()[0], "results": world.rows, "false_positives": false}, indent=2))
    else:
        Console(width=120).print(table(world.rows))
        click.echo(json.dumps(false, indent=2))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--quick", is_flag=True, help="64 bits in the LoRA alone.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def bits(folder: Path, quick: bool, as_json: bool) -> None:
    """Longer and shorter marks under attack."""
    folder.mkdir(parents=True, exist_ok=True)
    world, rows = opened(folder.resolve()), []
    for count in (64,) if quick else (32, 64, 128, 256):
        key = committed(f"{count} bits", count)
        for what in ("LoRA",) if quick else ("base", "LoRA"):
            lora = FolderModel(ZOO / "sample" / LORA, name=LORA, adapter_type="lora")
            plain = lora if what == "LoRA" else world.unmarked
            made, report = world.run("editor.weight-mark", plain, key=key, fidelity=False)
            change, needed = report["change"]["relative"], threshold(count, 1e-6, 2)
            row = {"what": what, "bits": count, "needed": needed, "change": change}
            for name, params in HARD[what].items():
                attacked = world.run("editor.attack", made, **params)[0]
                read = world.run("verifier.weight-mark", attacked, key=key, controls=1, users=1)[1]["reading"]
                row[name] = read["agreeing"]
            rows.append(row)
            click.echo(json.dumps(row), err=True)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        Console(width=120).print(row)


def committed(name: str, count: int) -> str:
    """The commitment of a key of that many bits in the open hub."""
    hub = Hub.open()
    with hub.transaction() as session:
        known = {key.name: key.id for key in list_keys(session)}
        found = known.get(name) or new_key(session, hub.settings, name, count).id
    hub.engine.dispose()
    return found


@main.command()
@click.option("--quick", is_flag=True, help="A small UNet.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def cost(quick: bool, as_json: bool) -> None:
    """Time and memory of marking and verifying a whole checkpoint."""
    from ingest import MODELGROVE, run
    from stream import QUICK, SDXL, write_checkpoint

    with TemporaryDirectory() as place:
        checkpoint = Path(place) / "checkpoint.safetensors"
        writer = get_context("spawn").Process(target=write_checkpoint, args=(checkpoint, QUICK if quick else SDXL))
        writer.start()
        writer.join()
        modelgrove = [*MODELGROVE, "--home", f"{place}/hub"]
        run([*modelgrove, "init"])
        run([*modelgrove, "ingest", "--mode", "reference", str(checkpoint)])
        run([*modelgrove, "key", "new", "ours"])
        rows = {
            "mark": run([*modelgrove, "mark", "checkpoint", "--key", "ours", "--name", "marked", "--local"]),
            "verify": run([*modelgrove, "verify", "marked", "--key", "ours", "--controls", "1", "--local"]),
        }
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    made = Table("what", "s", "cpu_s", "peak_mb")
    for name, row in rows.items():
        made.add_row(name, *(f"{row[key]:.0f}" for key in ("s", "cpu_s", "peak_mb")))
    Console().print(made)


def verdicts() -> dict[str, Callable[[bytes], str]]:
    """Ours: the first gate alone, the loader alone, and all three as the confined process has them."""
    from modelgrove_hub.formats.plain_pickles import check_plain
    from modelgrove_hub.ingest import unpickling

    unpickling.rehearse()

    def first(data: bytes) -> str:
        try:
            check_plain(io.BytesIO(data), len(data), "x")
        except UnsafeFileError:
            return "flagged"
        return "clean"

    def loader(data: bytes) -> str:
        try:
            torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception:  # noqa: BLE001  (it says no by exceptions of many kinds)
            return "flagged"
        return "clean"

    def all_three(data: bytes) -> str:
        return "flagged" if "refused" in unpickling.attempt(io.BytesIO(data), io.BytesIO(), len(data)) else "clean"

    return {"modelgrove": all_three, "its scan alone": first, "torch weights_only alone": loader}


def scanned(files: Mapping[str, bytes], peers: Path | None) -> dict[str, dict[str, tuple[str, float]]]:
    """Tool → file → verdict and seconds."""
    logging.getLogger("picklescan").setLevel(logging.CRITICAL)
    found: dict[str, dict[str, tuple[str, float]]] = {}
    for tool, judge in verdicts().items():
        found[tool] = {}
        for name, data in files.items():
            started = time.perf_counter()
            with warnings.catch_warnings(action="ignore"):
                verdict = judge(data)
            found[tool][name] = verdict, time.perf_counter() - started
    if peers is None:
        return found
    from scanners import TOOLS

    with TemporaryDirectory() as place:
        for name, data in files.items():
            (Path(place) / name).write_bytes(data)
        for tool in TOOLS:
            command = [str(peers / "bin/python"), str(Path(__file__).with_name("scanners.py")), tool, place]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[tool] = json.loads(done.stdout.splitlines()[-1])
    return found


@main.command()
@click.option("--peers", type=click.Path(path_type=Path, exists=True), help="Environment with the other scanners.")
@click.option("--quick", is_flag=True, help="One file in ten.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def scanners(peers: Path | None, quick: bool, as_json: bool) -> None:
    """Pickles made to hurt, and plain ones, before scanners."""
    spec = spec_from_file_location("pickled", Path(__file__).parents[1] / "tests/hub/pickled.py")
    assert spec
    assert spec.loader
    corpus = module_from_spec(spec)
    spec.loader.exec_module(corpus)
    step = 10 if quick else 1
    calls, others = (dict(list(made())[::step]) for made in (corpus.calling, corpus.abusing))
    plain = {name: data for name, data, _ in list(corpus.benign())[::step]}
    rows = {}
    for tool, said in scanned(calls | others | plain, peers).items():
        counts = Counter(said[name][0] for name in calls | others)
        rows[tool] = {
            "calls": sum(said[name][0] == "flagged" for name in calls),
            "others": sum(said[name][0] == "flagged" for name in others), "clean": counts["clean"],
            "error": counts["error"], "wrong": sum(said[name][0] != "clean" for name in plain),
            "ms": 1000 * sum(seconds for _, seconds in said.values()) / len(said),
        }  # fmt: skip
    assert not corpus.was_run(), f"something hostile was run: {corpus.OWNED} is there"
    if as_json:
        click.echo(
            json.dumps({"calls": len(calls), "others": len(others), "plain": len(plain), "results": rows}, indent=2)
        )
        return
    made = Table(
        f"{len(calls)} calls, {len(others)} others, {len(plain)} plain",
        "calls",
        "others",
        "clean",
        "error",
        "wrong",
        "ms",
    )
    for name, row in rows.items():
        made.add_row(name, *(f"{value:.1f}" if key == "ms" else str(value) for key, value in row.items()))
    Console(width=120).print(made)


main.add_command(heritage)

if __name__ == "__main__":
    main()
