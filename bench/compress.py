"""What compressors cost and keep on the zoo's base: `python bench/compress.py [--quick] [--json] [--method NAME]`.

Each row is a plugin's own run in a process of its own, so that its peak of memory is true.

    size        MiB written; ratio: of the original's
    error       of the denoiser's outputs against the original's, as the plugin's report has it; PSNR of the pictures
    seconds     wall time of the run, comparison included; peak: resident memory of its process, MiB
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
from importlib.metadata import entry_points
from multiprocessing import get_context
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

import modelgrove_analyzers
from modelgrove_hub.testing import FolderModel, run_plugin

BASE = Path(modelgrove_analyzers.__file__).parent / "zoo/data/zoo-base"
ROWS: tuple[tuple[str, dict[str, object]], ...] = (
    *(("rtn", {"bits": bits}) for bits in (8, 4, 3, 2)),
    *(("rtn", {"bits": weights, "activation_bits": inputs}) for weights, inputs in ((8, 8), (4, 8), (4, 4))),
    *(("gptq", {"bits": bits}) for bits in (8, 4, 3, 2)),
    *(("svdquant", {"activation_bits": bits}) for bits in (8, 4)),
    *(("auto", {"size": size}) for size in ("45%", "37%", "30%")),
    *(("magnitude", {"sparsity": share}) for share in ("0.2", "0.35", "0.5", "0.7")),
    *(("wanda", {"sparsity": share}) for share in ("0.2", "0.35", "0.5", "0.7")),
    *(("lrq-dit", {"bits": bits}) for bits in (4, 3)),
    *(("fp", {"bits": bits}) for bits in (8, 4)),
    *(("vq4dit", {"bits": bits, "iterations": 0}) for bits in (4, 3, 2)),
    *(("vq4dit", {"bits": bits}) for bits in (3, 2)),
    ("dgq", {}),
    ("hierarchical", {}),
    ("a-sdm", {}),
    ("q-diffusion", {}),
    ("tfmq", {}),
)
QUICK = (("rtn", {"bits": 8}), ("rtn", {"bits": 4}))


def measure(method: str, parameters: dict[str, object], folder: Path = BASE) -> dict[str, object]:
    """A row, from a process of its own."""
    with get_context("spawn").Pool(1) as pool:
        row: dict[str, object] = pool.apply(_run, (method, parameters, folder))
    return row


def _run(method: str, parameters: dict[str, object], folder: Path) -> dict[str, object]:
    (plugin,) = entry_points(group="modelgrove.plugins", name=f"compressor.{method}")
    with tempfile.TemporaryDirectory() as place:
        started = time.perf_counter()
        report = run_plugin(
            plugin.load()(), [FolderModel(folder, name=folder.name)], Path(place) / "job", parameters
        ).report
        seconds = time.perf_counter() - started
    return {
        "method": method,
        "parameters": parameters,
        "bytes": report["bytes_after"],
        "ratio": report["bytes_after"] / report["bytes_before"],
        "error": report["fidelity"].get("error"),
        "psnr_db": report["fidelity"].get("psnr_db"),
        "seconds": seconds,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def table(rows: list[dict[str, object]]) -> Table:
    """All rows."""
    made = Table("method", "parameters", "MiB", "ratio", "error", "PSNR dB", "s", "peak MiB")
    for row in rows:
        given = " ".join(f"{name}={value}" for name, value in row["parameters"].items())
        found = [f"{row[name]:.4g}" if row[name] is not None else "–" for name in ("error", "psnr_db")]
        made.add_row(
            row["method"], given, f"{row['bytes'] / 2**20:.2f}", f"{row['ratio']:.3f}", *found,
            f"{row['seconds']:.0f}", f"{row['peak_mib']:.0f}",
        )  # fmt: skip
    return made


@click.command()
@click.option("--quick", is_flag=True, help="Rounding to nearest at 8 and 4 bits only.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--method", "methods", multiple=True, help="Only this one; repeatable.")
def main(quick: bool, as_json: bool, methods: tuple[str, ...]) -> None:
    """Measure compressors on the zoo's base model."""
    rows = []
    for name, given in QUICK if quick else ROWS:
        if not methods or name in methods:
            rows.append(measure(name, given))
            click.echo(f"{name} {given}: error {rows[-1]['error']}", err=True)
    if as_json:
        click.echo(json.dumps({"load": os.getloadavg()[0], "results": rows}, indent=2))
        return
    Console(width=140).print(table(rows))


if __name__ == "__main__":
    main()
