"""What merging costs beside PEFT and beside copying a file: `python bench/merge.py [--quick] [--json]`.

Everything is read from files and written to files, each row in a process of its own; imports are not counted.

    adapters      8 LoRAs of rank 16 on 64 layers of 1280 × 1280, float32, become one: ours cut to rank 128, which holds
                  all of the sum, and PEFT's add_weighted_adapter on the same files. `error` is the distance of the
                  result from the exact sum (float64), as a share of it
    checkpoint    8 LoRAs of rank 16, float16, on the linear layers of SDXL's transformer blocks, baked into a UNet of
                  SDXL's shapes (2.57 billion parameters, fp16), beside a copy of that file's bytes

    cpu_s         CPU time of the process
    x             the same over that of our exact sum (adapters), or of the copy (checkpoint)
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
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from stream import QUICK, SDXL, write_checkpoint
from torch import nn

from modelgrove_hub.formats.adapters import Factors
from modelgrove_hub.formats.updates import open_updates
from modelgrove_hub.plugins import get_plugin
from modelgrove_hub.testing import FolderModel, run_plugin

COUNT, RANK, WIDTH, LAYERS, QUICK_LAYERS = 8, 16, 1280, 64, 4
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
OURS = ("sum", "ties", "knots", "tsv", "iso-c", "orthogonal", "legacy-linear")
PEERS = ("cat", "linear", "ties", "svd", "ties_svd")


def timed(work: Callable[..., None], *arguments: Any) -> dict[str, float]:
    """CPU seconds and peak memory of `work` in a process of its own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_timed, (work, arguments))


def _timed(work: Callable[..., None], arguments: tuple[Any, ...]) -> dict[str, float]:
    import diffusers
    import peft

    assert diffusers.__version__
    assert peft.__version__
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
    for work, arguments in ((write_checkpoint, (base, config)), (write_checkpoint_adapters, (base, loras))):
        process = get_context("spawn").Process(target=work, args=arguments)
        process.start()
        process.join()
    rows = [{"what": "copy", **timed(copy, base, folder / "copy.safetensors")}]
    (folder / "copy.safetensors").unlink()
    for count in (1, COUNT):
        rows.append({"what": f"modelgrove bakes {count}", **timed(bake, base, loras, count, folder / f"job-{count}")})
        shutil.rmtree(folder / f"job-{count}")
    for row in rows:
        row["x"] = row["cpu_s"] / rows[0]["cpu_s"]
    return rows


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    made = Table("what", "cpu_s", "s", "x", "peak_mb", "error", title=title, title_justify="left")
    for row in rows:
        error = f"{row['error']:.1e}" if "error" in row else ""
        made.add_row(
            row["what"], f"{row['cpu_s']:.2f}", f"{row['s']:.2f}", f"{row['x']:.1f}", f"{row['peak_mb']:.0f}", error
        )
    return made


@click.command()
@click.option("--quick", is_flag=True, help="Four layers, and a small UNet.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def main(quick: bool, as_json: bool) -> None:
    """Measure and print."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        found["adapters"] = adapters(Path(folder), QUICK_LAYERS if quick else LAYERS)
    with tempfile.TemporaryDirectory() as folder:
        found["checkpoint"] = checkpoint(Path(folder), QUICK if quick else SDXL)
    if as_json:
        click.echo(json.dumps({"load": os.getloadavg()[0], **found}, indent=2))
        return
    for title, rows in found.items():
        Console(width=100).print(table(f"{title}, load {os.getloadavg()[0]:.1f}", rows))


if __name__ == "__main__":
    main()
