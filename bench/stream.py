"""What compressing a whole checkpoint costs beside reading it: `python bench/stream.py [--quick] [--json]`.

A UNet with the shapes of SDXL (2.57 billion parameters, 5.1 GB in fp16; in quick runs one like SD 1 with fewer
channels), random weights in a single safetensors file, is ingested where it lies and compressed by the real command,
`modelgrove compress --method rtn --local`, which reads, rounds, writes, hashes and registers. Targets: int4 in twice
the time that it takes to read and hash the file, in less than 2 GiB.

    s          time on the clock; on a busy machine look at cpu_s instead
    cpu_s      CPU time of the process
    x_read     s over that of reading the file and hashing it with sha256, in the same run
    peak_mb    the largest memory of the process; pages of the mapped file are the system's, but count
    output_mb  size of the packed file
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
from ingest import MODELGROVE, run
from rich.console import Console
from rich.table import Table

SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}
QUICK: dict[str, Any] = {"block_out_channels": (96, 192, 320, 320), "cross_attention_dim": 768}
POOL = 1 << 24
"""Random numbers that all weights are taken from: drawing billions would take longer than the measurement."""
READ = "import hashlib, sys; print(hashlib.file_digest(open(sys.argv[1], 'rb'), 'sha256').hexdigest())"
METHODS = {"int8": ("--bits", "8"), "int4": ("--bits", "4")}


def write_checkpoint(path: Path, config: dict[str, Any]) -> None:
    """An fp16 file with the tensors of a UNet; matrices have the standard deviation 0.02."""
    import torch
    from diffusers import UNet2DConditionModel

    from modelgrove_hub.store.writer import SafetensorsWriter

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in UNet2DConditionModel(**config).state_dict().items()}
    pool = (0.02 * torch.randn(POOL, generator=torch.Generator().manual_seed(0))).half()
    with SafetensorsWriter(path, {"format": "pt"}) as writer:
        for number, (name, shape) in enumerate(shapes.items()):
            start, count = 7919 * number % (POOL // 2), shape.numel()
            writer.add(name, pool.repeat(1 + (start + count) // POOL)[start : start + count].reshape(shape))


def measure(folder: Path, config: dict[str, Any]) -> dict[str, dict[str, float]]:
    checkpoint, home = folder / "checkpoint.safetensors", str(folder / "hub")
    # Not in this process: the peak memory of a child counts what its parent held when it was forked.
    writer = get_context("spawn").Process(target=write_checkpoint, args=(checkpoint, config))
    writer.start()
    writer.join()
    modelgrove = [*MODELGROVE, "--home", home]
    run([*modelgrove, "init"])
    run([*modelgrove, "ingest", "--mode", "reference", str(checkpoint)])
    measured = {"read and hash": run([sys.executable, "-c", READ, str(checkpoint)])}
    for name, options in METHODS.items():
        before = stored(folder / "hub")
        arguments = ["--method", "rtn", *options, "--local", "--name", name]
        measured[f"rtn {name}"] = run([*modelgrove, "compress", checkpoint.stem, *arguments])
        measured[f"rtn {name}"]["output_mb"] = (stored(folder / "hub") - before) / 1e6
    for row in measured.values():
        row["x_read"] = row["s"] / measured["read and hash"]["s"]
    return measured


def stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def show(measured: dict[str, dict[str, float]]) -> None:
    table = Table(title=f"load {os.getloadavg()[0]:.1f}", title_justify="left")
    for column in ("what", "s", "cpu_s", "x_read", "peak_mb", "output_mb"):
        table.add_column(column)
    for name, row in measured.items():
        numbers = [f"{row[key]:.2f}" for key in ("s", "cpu_s", "x_read")]
        sizes = [f"{row[key]:.0f}" if key in row else "" for key in ("peak_mb", "output_mb")]
        table.add_row(name, *numbers, *sizes)
    Console().print(table)


@click.command()
@click.option("--quick", is_flag=True, help="A small UNet.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(quick: bool, as_json: bool) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), QUICK if quick else SDXL)
    if as_json:
        click.echo(json.dumps(measured, indent=2))
    else:
        show(measured)


if __name__ == "__main__":
    main()
