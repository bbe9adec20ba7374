"""What compressors cost and keep: `python bench/compress.py [--quick] [--json] [--method NAME] [--model NAME]`.

Each row is a run in a process of its own, so that its peak of memory is true. It is written to standard error as JSON
when it is there; the table at the end shows what was measured, after Ctrl-C too. A row that fails says why.

    size        MiB written; ratio: of the original's
    error       of the denoiser's outputs against the original's, as the plugin's report has it; PSNR of the pictures
    seconds     wall time of the run, comparison included; peak: resident memory of its process, MiB

The model is the zoo's base, or a network that an installed package carries (`networks.py`). `--peers FOLDER` adds other
packages on the same layers, compared by the same code (`peers.py`): FOLDER has torchao and optimum-quanto, as
`lib/python3.11/site-packages` of the virtual environment that `kernels.py` describes does. Their rows alone see it.
Their size is that of the tensors which they hold in memory.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from copy import deepcopy
from importlib.metadata import entry_points
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import networks
from peers import NETWORKS as PEERS
from rich.console import Console
from rich.table import Table

import modelgrove_analyzers
from modelgrove_hub.planning import size_of
from modelgrove_hub.testing import FolderModel, run_plugin

if TYPE_CHECKING:
    from torch import Tensor

Row = dict[str, Any]

BASE = "zoo-base"
FOLDER = Path(modelgrove_analyzers.__file__).parent / "zoo/data" / BASE
QUICK: tuple[tuple[str, Row], ...] = (("rtn", {"bits": 8}), ("rtn", {"bits": 4}))
WEIGHTS_ALONE: tuple[tuple[str, Row], ...] = (
    *(("rtn", {"bits": bits}) for bits in (8, 4, 3, 2)),
    *(("lrq-dit", {"bits": bits, "rotation": "none", "activation_bits": None}) for bits in (4, 3)),
    *(("fp", {"bits": bits, "iterations": 0}) for bits in (8, 4)),
    *(("vq4dit", {"bits": bits, "iterations": 0}) for bits in (4, 3, 2)),
    *(("magnitude", {"sparsity": share}) for share in ("0.2", "0.35", "0.5", "0.7")),
)
"""What needs no picture."""
CALIBRATED: tuple[tuple[str, Row], ...] = (
    *(("gptq", {"bits": bits}) for bits in (8, 4, 3, 2)),
    *(("rtn", {"bits": weights, "activation_bits": inputs}) for weights, inputs in ((8, 8), (4, 8), (4, 4))),
    *(("svdquant", {"activation_bits": bits}) for bits in (8, 4)),
    *(("wanda", {"sparsity": share}) for share in ("0.2", "0.35", "0.5", "0.7")),
    *(("auto", {"size": size}) for size in ("45%", "37%", "30%")),
)
LEARNED: tuple[tuple[str, Row], ...] = (
    *(("lrq-dit", {"bits": bits}) for bits in (4, 3)),
    *(("fp", {"bits": bits}) for bits in (8, 4)),
    *(("vq4dit", {"bits": bits}) for bits in (3, 2)),
    ("dgq", {}),
    ("hierarchical", {}),
    ("a-sdm", {}),
    ("q-diffusion", {}),
    ("tfmq", {}),
)
"""Slow, or for the blocks of diffusers."""
ROWS = {BASE: WEIGHTS_ALONE + CALIBRATED + LEARNED, **dict.fromkeys(networks.NETWORKS, WEIGHTS_ALONE + CALIBRATED)}


def measure(method: str, parameters: Row, model: str = BASE, peers: Path | None = None) -> Row:
    """A row, from a process of its own; `failed` says why if there is nothing else in it."""
    row = {"method": method, "parameters": parameters}
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return row | pool.submit(_run, method, parameters, model, peers).result()
    except BrokenProcessPool:
        return row | {"failed": "its process was killed"}


def _run(method: str, parameters: Row, model: str, peers: Path | None) -> Row:
    with tempfile.TemporaryDirectory() as place, subject(model, Path(place) / "model") as found:
        started = time.perf_counter()
        try:
            if peers and method in PEERS:
                work = _peer(method, found, Path(place), peers)
            else:
                work = _plugin(method, parameters, found, Path(place))
        except Exception as error:  # noqa: BLE001  (other packages raise anything; the next row is to be measured)
            return {"failed": f"{type(error).__name__}: {error}"}
        seconds = time.perf_counter() - started
    before, after, fidelity = work
    return {
        "bytes": after,
        "ratio": after / before,
        "error": fidelity.get("error"),
        "psnr_db": fidelity.get("psnr_db"),
        "seconds": seconds,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


@contextmanager
def subject(name: str, place: Path) -> Iterator[FolderModel]:
    """The model called `name`; what is not at hand as a folder is laid out in `place`."""
    if name == BASE:
        yield FolderModel(FOLDER, name=BASE)
    else:
        with networks.opened(name, place) as model:
            yield model


def _plugin(method: str, parameters: Row, model: FolderModel, place: Path) -> tuple[int, int, Row]:
    """Bytes before and after, and the report's `fidelity`."""
    (plugin,) = entry_points(group="modelgrove.plugins", name=f"compressor.{method}")
    report = run_plugin(plugin.load()(), [model], place / "job", parameters).report
    return report["bytes_before"], report["bytes_after"], report["fidelity"]


def _peer(name: str, model: FolderModel, place: Path, folder: Path) -> tuple[int, int, Row]:
    """The same of another package, given the layers that ours take by default."""
    from modelgrove_plugins.compress.fidelity import Comparison
    from modelgrove_plugins.compress.targets import CompressorParams
    from modelgrove_plugins.preview import diffusers

    comparison = Comparison(diffusers.open_painter(model, place / "original"), "unet")
    stored = {tensor.name: tensor for tensor in model.tensors()}
    taken = [path for path, tensor in stored.items() if CompressorParams().takes(tensor)]
    network = deepcopy(comparison.painter.networks["unet"]).requires_grad_(False)
    sys.path.append(str(folder))
    PEERS[name][1](network, [path.removeprefix("unet/").removesuffix(".weight") for path in taken])
    network.forward = _outside_inference_mode(network.forward)  # in which quanto's 4-bit tensors fail
    before = after = sum(map(size_of, stored.values()))
    for path in taken:
        packed = list(_tensors_in(network.get_parameter(path.removeprefix("unet/"))))
        if len(packed) > 1:
            after += sum(tensor.nbytes for tensor in packed) - size_of(stored[path])
    return before, after, comparison.judged(network, place / "sheet.png", name)


def _outside_inference_mode(forward: Callable[..., object]) -> Callable[..., object]:
    import torch

    def run(*positional: object, **named: object) -> object:
        with torch.inference_mode(False), torch.no_grad():
            return forward(*positional, **named)

    return run


def _tensors_in(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a package's own kind of tensor holds."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _tensors_in(getattr(tensor, name))
    else:
        yield tensor


def table(model: str, rows: list[Row]) -> Table:
    """All rows."""
    made = Table("method", "parameters", "MiB", "ratio", "error", "PSNR dB", "s", "peak MiB", title=model)
    for row in rows:
        given = " ".join(f"{name}={value}" for name, value in row["parameters"].items())
        if "failed" in row:
            made.add_row(row["method"], given, f"failed: {row['failed']}")
            continue
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
@click.option("--model", type=click.Choice([BASE, *networks.available()]), default=BASE, show_default=True)
@click.option("--peers", type=click.Path(path_type=Path, exists=True), help="Folder with torchao and optimum-quanto.")
def main(quick: bool, as_json: bool, methods: tuple[str, ...], model: str, peers: Path | None) -> None:
    """Measure compressors on a real model."""
    wanted = QUICK if quick else (*ROWS[model], *((name, {}) for name in PEERS if peers))
    rows: list[Row] = []
    try:
        for name, given in wanted:
            if not methods or name in methods:
                rows.append(measure(name, given, model, peers))
                click.echo(json.dumps(rows[-1]), err=True)
    finally:
        if as_json:
            click.echo(json.dumps({"model": model, "load": os.getloadavg()[0], "results": rows}, indent=2))
        else:
            Console(width=140).print(table(model, rows))


if __name__ == "__main__":
    main()
