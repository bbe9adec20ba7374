"""What quantized linear layers gain over fp32, and lose: `python bench/kernels.py [--quick] [--json]`.

One table for each number of threads and tokens; columns are inputs×outputs. The numbers are fp32 torch's time over the
layout's (CPU time for one thread, wall time for two), medians of rounds in which all layouts take turns. At one token
copies of a layer are called in turn, 48 MB of them, so that weights come from where a whole network's do.

    ceiling     the same for what the instructions can do: at one token the ratio of the bytes that are read, else of
                multiplications per cycle in loops on registers; the median over the columns, as `median` beside it
    error       ‖y - y'‖ / ‖y'‖ against float64 with the exact weights: what quantization costs; the worst column
    off         |y - y'| / max|y'| of a row against the layout's plain torch reference; the worst of all (target: 1e-5)

`w8a8` are torch's own operators, by engine. Other packages are compared if they can be imported; with a virtual
environment of their own, so that none of them brings another torch:

    python -m venv peers && echo torch==2.13.0 > torch.txt
    peers/bin/pip install -c torch.txt torch torchao optimum-quanto bitsandbytes gguf diffusers accelerate click rich
    PYTHONPATH=kernels peers/bin/python bench/kernels.py

Without a network bitsandbytes cannot fetch its fused 4-bit kernel for CPUs, and multiplies with unpacked weights.

Two threads are timed truly on an idle machine only; `--threads 1` leaves them out. `--isa avx2` keeps MKL, oneDNN,
FBGEMM, torch and our kernels from instructions that many machines do not have.
"""

from __future__ import annotations

import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import click
import torch
from isa import keep_to
from peers import PEERS, Make
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear

from modelgrove_kernels import native, reference
from modelgrove_kernels.lowrank import leading
from modelgrove_kernels.matmul import linear_lut4a8, linear_w4a8, prepack, prepack_branch
from modelgrove_kernels.packing import pack_nibbles, quantize
from modelgrove_kernels.reference import LookUp

SIZES, QUICK_SIZES = (640, 1280, 2560, 5120), (640, 1280)
TOKENS, QUICK_TOKENS = (1, 64, 256, 1024, 4096), (1, 64, 256)
MOST = 1024 * 2560 * 2560
"""Multiplications of a shape that is measured."""
ROUNDS, QUICK_ROUNDS = 7, 3
TURN = 0.01
"""Seconds, or one call, that a layout takes in a round."""
APART = 48e6
CHECKED = 64
"""Tokens whose outputs are compared."""
GROUP, RANK = 64, 32
PEAKS = {
    # Measured in loops on registers. AVX2, Zen 3: vpmaddubsw, vpmaddwd and vpaddd do 1.95 times the multiplications of
    # vfmadd231ps, vpmaddubsw and vpaddw alone, which 4-bit codes allow, 3.25 times (1.84 and 2.84 on Sapphire Rapids).
    # AVX-512, Sapphire Rapids: vpdpbusd does four times as many, as often.
    "avx2": {"w4a8": 3.25, "w4a8 rank 32": 3.25, "lut4": 1.95},
    "avx512vnni": dict.fromkeys(("w4a8", "w4a8 rank 32", "lut4"), 4.0),
}

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """Copies of a layer in one layout, the bytes of each, and what it should compute, if there is a reference."""

    calls: list[Call]
    nbytes: int
    plain: Call | None = None


Layout = Callable[[Tensor, Tensor], Layer]


def fp32(weight: Tensor, bias: Tensor) -> Layer:
    return copies(lambda: partial(linear, weight=weight.clone(), bias=bias), weight.nbytes)


def w4a8(weight: Tensor, bias: Tensor) -> Layer:
    packed = quantize(weight, 4, GROUP)
    stored, plain = prepack(packed), partial(reference.linear_w4a8, weight=packed, bias=bias)
    rows = len(weight)
    return copies(
        lambda: partial(linear_w4a8, weight=stored.clone(), rows=rows, group=GROUP, bias=bias), stored.nbytes, plain
    )


def w4a8_branch(weight: Tensor, bias: Tensor) -> Layer:
    """SVDQuant's form: smoothing, and the leading directions kept in a branch."""
    smooth = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(1)) + 0.5
    factors = leading(weight * smooth, RANK).factors()
    packed = quantize(weight * smooth - factors.up @ factors.down, 4, GROUP)
    stored, branch = prepack(packed), prepack_branch(factors.down, factors.up)
    beside = {"rows": len(weight), "group": GROUP, "smooth": smooth, "bias": bias}
    plain = partial(reference.linear_w4a8, weight=packed, smooth=smooth, down=factors.down, up=factors.up, bias=bias)
    return copies(
        lambda: partial(linear_w4a8, weight=stored.clone(), branch=branch.clone(), **beside),
        stored.nbytes + branch.nbytes,
        plain,
    )


def lut4(weight: Tensor, bias: Tensor) -> Layer:
    """The middle of every sixteenth of a normal distribution, as levels."""
    levels = torch.special.ndtri((torch.arange(16) + 0.5) / 16)
    table = (levels / levels[-1] * 127).round()
    groups = weight.view(len(weight), -1, GROUP)
    scales = groups.abs().amax(-1) / 127
    borders = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(groups / scales.unsqueeze(-1), borders).to(torch.uint8).flatten(1)
    packed = LookUp(pack_nibbles(codes), table.to(torch.int8).unsqueeze(0), scales, weight.shape[1], GROUP)
    stored, plain = prepack(packed), partial(reference.linear_w4a8, weight=packed, bias=bias)
    rows = len(weight)
    return copies(
        lambda: partial(linear_lut4a8, weight=stored.clone(), rows=rows, group=GROUP, bias=bias), stored.nbytes, plain
    )


def w8a8(engine: str, weight: Tensor, bias: Tensor) -> Layer:
    """torch's dynamically quantized linear layer; FBGEMM's needs activations of 7 bits for exact sums on AVX2."""
    torch.backends.quantized.engine = engine
    scales = weight.abs().amax(1).double() / 127
    codes = torch.quantize_per_channel(weight, scales, torch.zeros(len(weight), dtype=torch.long), 0, torch.qint8)
    stored = torch.ops.quantized.linear_prepack(codes, bias)
    narrow = engine == "x86"
    return copies(
        lambda: partial(multiply_w8a8, stored=deepcopy(stored), narrow=narrow), weight.numel() + 4 * len(weight)
    )


def multiply_w8a8(x: Tensor, stored: torch.ScriptObject, narrow: bool) -> Tensor:
    y: Tensor = torch.ops.quantized.linear_dynamic(x, stored, narrow)
    return y


def peer(make: Make, weight: Tensor, bias: Tensor) -> Layer:
    return copies(make(weight, bias), weight.numel())


def copies(make: Callable[[], Call], nbytes: int, plain: Call | None = None) -> Layer:
    return Layer([make() for _ in range(max(1, round(APART / nbytes)))], nbytes, plain)


def layouts() -> dict[str, Layout]:
    ours: dict[str, Layout] = {"w4a8": w4a8, "w4a8 rank 32": w4a8_branch, "lut4": lut4}
    torchs: dict[str, Layout] = {f"w8a8 {engine}": partial(w8a8, engine) for engine in ("onednn", "x86")}
    found = {name: partial(peer, make) for name, (package, make) in PEERS.items() if find_spec(package)}
    return {"fp32": fp32} | ours | torchs | found


def ceiling(name: str, tokens: int, weight: Tensor, nbytes: int) -> float | None:
    """Times fp32's speed that this layout can have."""
    peak = PEAKS.get(native.isa(), {}).get(name)
    if peak is None:
        return None
    if tokens == 1:
        return weight.nbytes / nbytes
    rows, columns = weight.shape
    branch = RANK * (1 / rows + 1 / columns) if "rank" in name else 0
    return 1 / (1 / peak + branch)


def times(calls: dict[str, list[Call]], x: Tensor, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds a call, of each layout in each round."""
    turns = {name: turn_of(some, x, clock) for name, some in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, turn in turns.items():
            started = clock()
            for call in turn:
                call(x)
            taken[name].append((clock() - started) / len(turn))
    return taken


def turn_of(calls: list[Call], x: Tensor, clock: Callable[[], float]) -> list[Call]:
    """The calls of one round: every copy at one token, else one of them again and again."""
    if len(x) == 1:
        return calls
    calls[0](x)
    started = clock()
    calls[0](x)
    return calls[:1] * max(1, round(TURN / (clock() - started)))


def measure(
    layers: dict[str, Layer], weight: Tensor, bias: Tensor, tokens: int, threads: int, rounds: int
) -> Iterator[dict[str, object]]:
    """A row for every layout."""
    x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(tokens))
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    taken = times({name: layer.calls for name, layer in layers.items()}, x, rounds, clock)
    few = x[:CHECKED]
    exact = few.double() @ weight.double().T + bias
    for name, layer in layers.items():
        y = layer.calls[0](few)
        yield {
            "layout": name,
            "tokens": tokens,
            "inputs": weight.shape[1],
            "outputs": weight.shape[0],
            "threads": threads,
            "ms": 1000 * statistics.median(taken[name]),
            "ratio": statistics.median(base / own for base, own in zip(taken["fp32"], taken[name], strict=True)),
            "ceiling": ceiling(name, tokens, weight, layer.nbytes),
            "error": float((y.double() - exact).norm() / exact.norm()),
            "off": None if layer.plain is None else distance(y, layer.plain(few)),
        }


def distance(y: Tensor, wanted: Tensor) -> float:
    return float(((y - wanted).abs().amax(1) / wanted.abs().amax(1)).max())


def sweep(
    sizes: tuple[int, ...], tokens: tuple[int, ...], rounds: int, threads: tuple[int, ...]
) -> Iterator[dict[str, object]]:
    for columns in sizes:
        for rows in sizes:
            random = torch.Generator().manual_seed(columns + rows)
            weight = torch.randn(rows, columns, generator=random) / columns**0.5
            bias = torch.randn(rows, generator=random)
            layers = {name: make(weight, bias) for name, make in layouts().items()}
            for count in threads:
                for asked in tokens:
                    if asked * rows * columns <= MOST:
                        yield from measure(layers, weight, bias, asked, count, rounds)
            click.echo(f"{columns}×{rows} measured", err=True)


def tables(results: list[dict[str, object]]) -> Iterator[Table]:
    """One for each number of threads and tokens."""
    for threads, tokens in sorted({(row["threads"], row["tokens"]) for row in results}):
        chosen = [row for row in results if (row["threads"], row["tokens"]) == (threads, tokens)]
        shapes = list(dict.fromkeys(f"{row['inputs']}×{row['outputs']}" for row in chosen))
        title = f"tokens: {tokens}, threads: {threads}"
        table = Table("", *shapes, "median", "ceiling", "error", "off", title=title)
        for name in dict.fromkeys(str(row["layout"]) for row in chosen):
            rows = [row for row in chosen if row["layout"] == name]
            ratios, ceilings, errors, off = (
                [row[key] for row in rows if row[key] is not None] for key in ("ratio", "ceiling", "error", "off")
            )
            table.add_row(
                name,
                *(f"{ratio:.2f}" for ratio in ratios),
                f"{statistics.median(ratios):.2f}",
                f"{statistics.median(ceilings):.2f}" if ceilings else "",
                f"{max(errors):.1e}",
                f"{max(off):.1e}" if off else "",
            )
        yield table


@click.command()
@click.option("--quick", is_flag=True, help="Small layers and few tokens only.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--threads", type=int, multiple=True, default=(1, 2), show_default=True, help="Repeatable.")
@click.option("--isa", type=click.Choice(["avx2"]), help="Keep all libraries to these instructions.")
def main(quick: bool, as_json: bool, threads: tuple[int, ...], isa: str | None) -> None:
    """Measure quantized linear layers against fp32."""
    keep_to(isa)
    warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
    with torch.no_grad():
        choice = (QUICK_SIZES, QUICK_TOKENS, QUICK_ROUNDS) if quick else (SIZES, TOKENS, ROUNDS)
        results = list(sweep(*choice, threads))
    machine = {"isa": native.isa(), "load": os.getloadavg()[0], "torch": torch.__version__}
    if as_json:
        click.echo(json.dumps({**machine, "results": results}, indent=2))
        return
    for table in tables(results):
        Console(width=200).print(table)
    click.echo(json.dumps(machine))


if __name__ == "__main__":
    main()
