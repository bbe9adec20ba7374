"""What merging costs beside others and beside copying a file: `python bench/merge.py [--quick] [--json] [--part NAME]`.

Everything is read from files and written to files, each row in a process of its own; imports are not counted. Others
are PEFT, mergekit (`mergekit-pytorch`) and sd-mecha, on the same files and interleaved with ours.

    adapters      8 LoRAs of rank 16 on 64 layers of 1280 × 1280, float32, become one: ours cut to rank 128, which holds
                  all of the sum, and PEFT's add_weighted_adapter on the same files. `error` is the distance of the
                  result from the exact sum (float64), as a share of it
    checkpoint    8 LoRAs of rank 16, float16, on the linear layers of SDXL's transformer blocks, baked into a UNet of
                  SDXL's shapes (2.57 billion parameters, fp16), beside a copy of that file's bytes
    checkpoints   two fine-tunes of that UNet, fp16, become one: averaged, by the sum of their differences from it, and
                  by TIES of those at a density of .2. `error` is the distance from float64 arithmetic as a share of
                  what was changed, over every twentieth tensor

    cpu_s         CPU time of the process
    x             the same over that of our exact sum (adapters), of the copy (checkpoint), or of ours (checkpoints)
    peak_mb       its largest memory; pages of mapped inputs count

Targets: the exact merge in a fiftieth of PEFT's `svd`; a checkpoint in three times the CPU time of its copy, in less
than three of its largest tensors and 500 MB.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stream import POOL, QUICK, SDXL, write_checkpoint
from torch import Tensor, nn

from modelgrove_hub.formats.adapters import Factors
from modelgrove_hub.formats.updates import open_updates
from modelgrove_hub.plugins import get_plugin
from modelgrove_hub.store.writer import SafetensorsWriter
from modelgrove_hub.testing import FolderModel, run_plugin

COUNT, RANK, WIDTH, LAYERS, QUICK_LAYERS = 8, 16, 1280, 64, 4
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
OURS = ("sum", "ties", "knots", "tsv", "iso-c", "orthogonal", "legacy-linear")
PEERS = ("cat", "linear", "ties", "svd", "ties_svd")
DENSITY = 0.2
MIXES = ("average", "differences", "ties")
SAMPLED = 20


def timed(
    work: Callable[..., None], *arguments: Any, needs: tuple[str, ...] = ("diffusers", "peft")
) -> dict[str, float]:
    """CPU seconds and peak memory of `work` in a process of its own, after it has imported what it `needs`."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_timed, (work, arguments, needs))


def _timed(work: Callable[..., None], arguments: tuple[Any, ...], needs: tuple[str, ...]) -> dict[str, float]:
    for module in needs:
        import_module(module)
    torch.linalg.svd(torch.eye(8))  # its library is loaded at the first use
    started, clock = time.process_time(), time.perf_counter()
    work(*arguments)
    return {
        "cpu_s": time.process_time() - started,
        "s": time.perf_counter() - clock,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def write_adapters(folder: Path, layers: int) -> None:
    """PEFT's folders, one a LoRA."""
    for number in range(COUNT):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for layer in range(layers):
            stem = f"base_model.model.layer_{layer}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, WIDTH, generator=generator) / WIDTH**0.5
            tensors[f"{stem}.lora_B.weight"] = torch.randn(WIDTH, RANK, generator=generator) / WIDTH**0.5
        place = folder / f"lora_{number}"
        place.mkdir(parents=True)
        save_file(tensors, place / "adapter_model.safetensors")
        fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": r"layer_\d+"}
        (place / "adapter_config.json").write_text(json.dumps(fields), "utf-8")


def inputs(folder: Path) -> list[FolderModel]:
    return [FolderModel(path, name=path.name, adapter_type="lora") for path in sorted(folder.glob("lora_*"))]


def join(folder: Path, method: str, job: Path) -> None:
    """Our merger."""
    run_plugin(get_plugin(f"merger.{method}")(), inputs(folder), job, {"rank": COUNT * RANK})


def join_by_peft(folder: Path, kind: str, layers: int, job: Path) -> None:
    """PEFT's, with its own loading and saving."""
    from peft import PeftModel

    with torch.device("meta"):
        network = nn.ModuleDict({f"layer_{layer}": nn.Linear(WIDTH, WIDTH, bias=False) for layer in range(layers)})
    network = network.to_empty(device="cpu")
    names = [path.name for path in sorted(folder.glob("lora_*"))]
    model = PeftModel.from_pretrained(network, folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    more = {"svd_rank": COUNT * RANK} if "svd" in kind else {}
    more |= {"density": 0.2} if "ties" in kind else {}
    model.add_weighted_adapter(names, [1.0] * COUNT, "merged", combination_type=kind, **more)
    model.save_pretrained(job, selected_adapters=["merged"])


def error_of(result: Path, folder: Path) -> float:
    """‖result − exact sum‖ / ‖exact sum‖ over all layers, float64."""
    exact, found = (
        [open_updates(model).targets for model in models] for models in (inputs(folder), [FolderModel(result)])
    )
    away = total = 0.0
    for name, update in found[0].items():
        wanted = sum(dense(targets[name].read()) for targets in exact)
        away += float((dense(update.read()) - wanted).square().sum())
        total += float(wanted.square().sum())
    return (away / total) ** 0.5


def dense(update: Factors | torch.Tensor) -> torch.Tensor:
    return update.up.double() @ update.down.double() if isinstance(update, Factors) else update.double()


def adapters(folder: Path, layers: int) -> list[dict[str, Any]]:
    write_adapters(folder, layers)
    rows = []
    for method in OURS:
        measured = timed(join, folder, method, folder / f"job-{method}")
        rows.append(
            {"what": f"modelgrove {method}", **measured, "error": error_of(folder / f"job-{method}/out", folder)}
        )
    for kind in PEERS:
        measured = timed(join_by_peft, folder, kind, layers, folder / f"peft-{kind}")
        error = error_of(folder / f"peft-{kind}/merged", folder)
        rows.append({"what": f"peft {kind}", **measured, "error": error})
    for row in rows:
        row["x"] = row["cpu_s"] / rows[0]["cpu_s"]
    return rows


def write_checkpoint_adapters(base: Path, folder: Path) -> None:
    shapes = {name: tensor.shape for name, tensor in load_file(base).items()}
    modules = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if len(shape) == 2 and name.removesuffix(".weight").endswith(TARGETS)
    }
    for number in range(COUNT):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name, (out, width) in modules.items():
            tensors[f"unet.{name}.lora_A.weight"] = (torch.randn(RANK, width, generator=generator) / 50).half()
            tensors[f"unet.{name}.lora_B.weight"] = (torch.randn(out, RANK, generator=generator) / 50).half()
        save_file(tensors, folder / f"lora_{number}.safetensors")
    click.echo(f"{len(modules)} layers", err=True)


def copy(base: Path, target: Path) -> None:
    """As a program copies that looks at the bytes: read and write, then flush."""
    with base.open("rb") as source, target.open("wb") as file:
        while block := source.read(1 << 24):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def bake(base: Path, folder: Path, count: int, job: Path) -> None:
    # The recipe names its models by their hashes, which a registry knows.
    known = {path.name: "0" * 64 for path in (base, *folder.glob("*.safetensors"))}
    models = [
        FolderModel(path, name=path.stem, adapter_type="lora", hashes=known)
        for path in sorted(folder.glob("*.safetensors"))
    ]
    run_plugin(get_plugin("merger.sum")(), [*models[:count], FolderModel(base, hashes=known)], job, {"base": True})


def checkpoint(folder: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    base, loras = folder / "base.safetensors", folder / "loras"
    loras.mkdir()
    _in_a_child(write_checkpoint, base, config)
    _in_a_child(write_checkpoint_adapters, base, loras)
    rows = [{"what": "copy", **timed(copy, base, folder / "copy.safetensors")}]
    (folder / "copy.safetensors").unlink()
    for count in (1, COUNT):
        rows.append({"what": f"modelgrove bakes {count}", **timed(bake, base, loras, count, folder / f"job-{count}")})
        shutil.rmtree(folder / f"job-{count}")
    for row in rows:
        row["x"] = row["cpu_s"] / rows[0]["cpu_s"]
    return rows


def write_fine_tune(base: Path, path: Path, seed: int) -> None:
    """The base with differences of a tenth of its standard deviation, half of them the same for all seeds."""
    drawn = [torch.randn(3 * POOL, generator=torch.Generator().manual_seed(number)) for number in (100, 100 + seed)]
    pool = 0.0014 * (drawn[0] + drawn[1])
    with safe_open(base, "pt") as source, SafetensorsWriter(path, {"format": "pt"}) as writer:
        for number, name in enumerate(_names(source)):
            tensor = source.get_tensor(name)
            start = 7919 * number % POOL
            moved = pool[start : start + tensor.numel()]
            writer.add(name, (tensor.float() + moved.view_as(tensor)).half())


def mix(files: list[Path], method: str, job: Path) -> None:
    """Ours: the fine-tunes, then the base."""
    known = {path.name: "0" * 64 for path in files}  # which a registry knows
    models = [FolderModel(path, name=path.stem, hashes=known) for path in files]
    if method == "average":
        run_plugin(get_plugin("merger.sum")(), models[:-1], job, {})
    elif method == "differences":
        run_plugin(get_plugin("merger.sum")(), models, job, {"base": True, "weights": [0.5, 0.5]})
    else:
        run_plugin(get_plugin("merger.ties")(), models, job, {"base": True, "density": DENSITY})


def mix_by_mergekit(files: list[Path], method: str, job: Path) -> None:
    """mergekit-pytorch with its defaults: it computes in the dtype of the files."""
    from mergekit.scripts.merge_raw_pytorch import main

    names = {"average": "linear", "differences": "task_arithmetic", "ties": "ties"}
    weight = 1.0 if method == "ties" else 0.5
    recipe: dict[str, Any] = {
        "merge_method": names[method],
        "models": [{"model": str(path), "parameters": {"weight": weight}} for path in files[:-1]],
    }
    if method != "average":
        recipe["base_model"] = str(files[-1])
    if method == "ties":
        recipe["parameters"] = {"density": DENSITY}
    job.mkdir(parents=True)
    (job / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    main.main([str(job / "recipe.yaml"), str(job / "out"), "--quiet"], standalone_mode=False)


def mix_by_sd_mecha(files: list[Path], method: str, job: Path) -> None:
    """sd-mecha with its defaults (float32 inside), in one thread; signs of TIES by mass, as the paper has them."""
    import sd_mecha
    from sd_mecha.extensions.builtin.merge_methods.linear import add_difference
    from sd_mecha.extensions.model_configs import from_yaml, register

    with safe_open(files[0], "pt") as source:
        keys = {name: {"shape": source.get_slice(name).get_shape(), "dtype": "float16"} for name in source.keys()}  # noqa: SIM118  (a safe_open is no dictionary)
    config = from_yaml(yaml.safe_dump({"identifier": f"bench-{method}", "components": {"unet": keys}}))
    register(config)
    first, second, base = (sd_mecha.model(path, config) for path in files)
    updates = [sd_mecha.subtract(model, base) for model in (first, second)]
    if method == "average":
        recipe = sd_mecha.weighted_sum(first, second, alpha=0.5)
    elif method == "differences":
        recipe = add_difference(add_difference(base, updates[0], alpha=0.5), updates[1], alpha=0.5)
    else:
        recipe = add_difference(base, sd_mecha.ties_sum(*updates, k=DENSITY, vote_sgn=True))
    (job / "out").mkdir(parents=True)
    sd_mecha.merge(recipe, output=job / "out/model.safetensors", output_dtype=torch.float16, threads=0)


MIXERS: Mapping[str, tuple[Callable[[list[Path], str, Path], None], tuple[str, ...]]] = {
    "modelgrove": (mix, ("torch",)),
    "mergekit": (mix_by_mergekit, ("mergekit.scripts.merge_raw_pytorch",)),
    "sd-mecha": (mix_by_sd_mecha, ("sd_mecha",)),
}


def exact_mix(method: str, first: Tensor, second: Tensor, base: Tensor) -> Tensor:
    """In float64, from the formula."""
    if method != "ties":
        return (first + second) / 2
    updates = []
    for model in (first, second):
        update = model - base
        magnitudes = update.abs().flatten()
        floor = magnitudes.sort().values[update.numel() - max(1, int(DENSITY * update.numel()))]
        updates.append(torch.where(update.abs() >= floor, update, 0.0))
    sign = sum(updates).sign()
    agreeing = [(update.sign() == sign) & (update != 0) for update in updates]
    total = sum(update * agrees for update, agrees in zip(updates, agreeing, strict=True))
    return base + total / sum(agrees.double() for agrees in agreeing).clamp_min(1)


def error_of_mix(files: list[Path], method: str, job: Path) -> float:
    """‖result − exact‖ / ‖exact − base‖ over every twentieth tensor."""
    place = {}
    for path in job.rglob("out/*.safetensors"):
        with safe_open(path, "pt") as found:
            place |= dict.fromkeys(_names(found), path)
    away = total = 0.0
    for name in sorted(place)[::SAMPLED]:
        first, second, base, result = (_tensor(path, name) for path in (*files, place[name]))
        exact = exact_mix(method, first, second, base)
        away += float((result - exact).square().sum())
        total += float((exact - base).square().sum())
    return (away / total) ** 0.5


def _names(file: Any) -> list[str]:
    return list(file.keys())


def _tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as found:
        return found.get_tensor(name).double()


def checkpoints(folder: Path, config: dict[str, Any], methods: Sequence[str]) -> list[dict[str, Any]]:
    files = [folder / f"{name}.safetensors" for name in ("one", "two", "base")]
    _in_a_child(write_checkpoint, files[-1], config)
    for seed, path in enumerate(files[:-1], 1):
        _in_a_child(write_fine_tune, files[-1], path, seed)
    rows: list[dict[str, Any]] = []
    for method in methods:
        own = len(rows)
        for name, (work, needs) in MIXERS.items():
            job = folder / f"{name}-{method}"
            rows.append({"what": f"{name}, {method}", **timed(work, files, method, job, needs=needs)})
            with get_context("spawn").Pool(1) as pool:
                rows[-1]["error"] = pool.apply(error_of_mix, (files, method, job))
            rows[-1]["x"] = rows[-1]["cpu_s"] / rows[own]["cpu_s"]
            click.echo(json.dumps(rows[-1]), err=True)
            shutil.rmtree(job)
    return rows


def _in_a_child(work: Callable[..., None], *arguments: Any) -> None:
    """So that this process stays small: the peak memory of a child counts what its parent held."""
    process = get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    made = Table("what", "cpu_s", "s", "x", "peak_mb", "error", title=title, title_justify="left")
    for row in rows:
        error = f"{row['error']:.1e}" if "error" in row else ""
        made.add_row(
            row["what"], f"{row['cpu_s']:.2f}", f"{row['s']:.2f}", f"{row['x']:.1f}", f"{row['peak_mb']:.0f}", error
        )
    return made


PARTS = ("adapters", "checkpoint", "checkpoints")


@click.command()
@click.option("--quick", is_flag=True, help="Four layers, and a small UNet, whose fine-tunes are merged by TIES alone.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, help="Only this one; repeatable.")
@click.option("--method", "methods", type=click.Choice(MIXES), multiple=True, help="Of checkpoints, so; repeatable.")
def main(quick: bool, as_json: bool, parts: tuple[str, ...], methods: tuple[str, ...]) -> None:
    """Measure and print."""
    config = QUICK if quick else SDXL
    found = {}
    for part in parts or PARTS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if part == "adapters":
                found[part] = adapters(folder, QUICK_LAYERS if quick else LAYERS)
            elif part == "checkpoint":
                found[part] = checkpoint(folder, config)
            else:
                found[part] = checkpoints(folder, config, methods or (("ties",) if quick else MIXES))
    if as_json:
        click.echo(json.dumps({"load": os.getloadavg()[0], **found}, indent=2))
        return
    for title, rows in found.items():
        Console(width=100).print(table(f"{title}, load {os.getloadavg()[0]:.1f}", rows))


if __name__ == "__main__":
    main()
