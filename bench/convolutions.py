"""What quantized convolutions gain over fp32, and lose: `python bench/convolutions.py [--quick] [--isa avx2] [--json]`.

Shapes are those of Stable Diffusion's UNet at 512×512 pixels, one picture. A layer takes and gives torch's own tensors,
so the ratio holds all of it: the largest value of a picture, rounding, reordering, products, scales and bias.

    ratio       fp32 torch's time over the layer's (CPU time for one thread, wall time for two), the median of rounds in
                which all take turns
    error       ‖y - y'‖ / ‖y'‖ against float64 with the exact weights: what quantization costs
    off         max|y - y'| / max|y'| against the layer's plain torch reference (target: 1e-5)
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import click
import torch
from isa import keep_to
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from modelgrove_kernels import native
from modelgrove_kernels.conv import reference
from modelgrove_kernels.layouts import Layout
from modelgrove_kernels.modules import QuantConv2d
from modelgrove_kernels.packing import quantize

ROUNDS, QUICK_ROUNDS = 9, 3
LAYOUTS = {"w8a8": (8, None), "w4a8": (4, 64)}
TARGETS = {"w8a8": 1.6, "w4a8": 1.8}


@dataclass(frozen=True)
class Shape:
    """A convolution of a square picture, padded to keep its size."""

    inputs: int
    outputs: int
    side: int
    kernel: int = 3
    stride: int = 1

    @property
    def name(self) -> str:
        """As in "320→640 k3 32²"."""
        stride = f" s{self.stride}" if self.stride > 1 else ""
        return f"{self.inputs}→{self.outputs} k{self.kernel}{stride} {self.side}²"


SHAPES = (
    Shape(320, 320, 64), Shape(320, 320, 64, stride=2), Shape(320, 640, 32), Shape(640, 640, 32), Shape(640, 1280, 16),
    Shape(1280, 1280, 16), Shape(1280, 1280, 8), Shape(2560, 1280, 16), Shape(1920, 640, 32), Shape(960, 320, 64),
    Shape(640, 320, 64, kernel=1), Shape(1280, 640, 32, kernel=1),
)  # fmt: skip
QUICK_SHAPES = SHAPES[:4]


def measure(shape: Shape, threads: int, rounds: int) -> Iterator[dict[str, object]]:
    """A row for each layout."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    exact = nn.Conv2d(shape.inputs, shape.outputs, shape.kernel, shape.stride, shape.kernel // 2).requires_grad_(False)
    picture = torch.randn(1, shape.inputs, shape.side, shape.side)
    layers = {name: quantized(exact, *form) for name, form in LAYOUTS.items()}
    taken = times({"fp32": exact, **layers}, picture, rounds, time.process_time if threads == 1 else time.perf_counter)
    wanted = nn.functional.conv2d(
        picture.double(), exact.weight.double(), exact.bias.double(), shape.stride, shape.kernel // 2
    )
    for name, layer in layers.items():
        found = layer(picture)
        plain = reference(picture, layer.weight, layer.geometry, layer.bias, None)
        yield {
            "shape": shape.name,
            "layout": name,
            "threads": threads,
            "ms": 1000 * statistics.median(taken[name]),
            "ratio": statistics.median(base / own for base, own in zip(taken["fp32"], taken[name], strict=True)),
            "error": float((found - wanted).norm() / wanted.norm()),
            "off": float((found - plain).abs().max() / plain.abs().max()),
        }


def quantized(layer: nn.Conv2d, bits: int, group: int | None) -> QuantConv2d:
    """The layer with its weight rounded to nearest."""
    packed = quantize(layer.weight.permute(0, 2, 3, 1).flatten(1), bits, group)
    parts = {"codes": packed.codes, "scales": packed.scales}
    parts |= {} if packed.zeros is None else {"zeros": packed.zeros}
    return QuantConv2d(layer, Layout(f"int{bits}", packed.columns, bits, packed.group), parts)


def times(
    layers: dict[str, Callable[[Tensor], Tensor]], x: Tensor, rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds a call, of each layer in each round."""
    taken: dict[str, list[float]] = {name: [] for name in layers}
    for turn in range(rounds + 1):
        for name, layer in layers.items():
            started = clock()
            layer(x)
            if turn:  # the first round warms up
                taken[name].append(clock() - started)
    return taken


def tables(results: list[dict[str, object]]) -> Iterator[Table]:
    """One for each number of threads."""
    for threads in sorted({row["threads"] for row in results}):
        rows = [row for row in results if row["threads"] == threads]
        table = Table("convolution", *(f"{name} {what}" for name in LAYOUTS for what in ("ratio", "error", "off")))
        table.title = f"threads: {threads}"
        for shape in dict.fromkeys(str(row["shape"]) for row in rows):
            cells = [row for row in rows if row["shape"] == shape]
            table.add_row(
                shape,
                *(
                    text
                    for row in cells
                    for text in (f"{row['ratio']:.2f}", f"{row['error']:.1e}", f"{row['off']:.0e}")
                ),
            )
        medians = [
            f"{statistics.median(row['ratio'] for row in rows if row['layout'] == name):.2f}" for name in LAYOUTS
        ]
        table.add_row("median", *(text for median in medians for text in (median, "", "")))
        table.add_row("target", *(text for target in TARGETS.values() for text in (f"{target:.2f}", "", "1e-05")))
        yield table


@click.command()
@click.option("--quick", is_flag=True, help="Few shapes and rounds.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--threads", type=int, multiple=True, default=(1, 2), show_default=True, help="Repeatable.")
@click.option("--isa", type=click.Choice(["avx2"]), help="Keep all libraries to these instructions.")
def main(quick: bool, as_json: bool, threads: tuple[int, ...], isa: str | None) -> None:
    """Measure quantized convolutions against fp32."""
    keep_to(isa)
    shapes, rounds = (QUICK_SHAPES, QUICK_ROUNDS) if quick else (SHAPES, ROUNDS)
    with torch.no_grad():
        results = [row for count in threads for shape in shapes for row in measure(shape, count, rounds)]
    machine = {"isa": native.isa(), "load": os.getloadavg()[0], "torch": torch.__version__}
    if as_json:
        click.echo(json.dumps({**machine, "results": results}, indent=2))
        return
    for table in tables(results):
        Console(width=140).print(table)
    click.echo(json.dumps(machine))


if __name__ == "__main__":
    main()
