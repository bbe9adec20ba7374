"""What whole denoisers gain on quantized kernels: `python bench/denoisers.py [--quick] [--isa avx2] [--json]`.

Networks have the real shapes of PixArt-α at 512×512 pixels and of Stable Diffusion 1's UNet, with random weights. Each
takes `STEPS` steps of DDIM with guidance (a batch of two), eager diffusers fp32 and the quantized copies in turns, on
the same noise; the text encoder and the autoencoder are left out, they stay as they are.

    ratio       fp32's time over the copy's (wall time), the median of the rounds
    memory      resident memory that the weights take in a process of their own, over fp32's
    error       ‖x - x'‖ / ‖x'‖ of the last latents. Random weights know nothing, so this says little of pictures
    profile     where the copy's time goes: operators by their own share
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from multiprocessing import get_context

import click
import psutil
import torch
from diffusers import DDIMScheduler, PixArtTransformer2DModel, UNet2DConditionModel
from isa import keep_to
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from modelgrove_kernels import native
from modelgrove_plugins.preview.quantized import GRIDS, quantize_network

STEPS, ROUNDS, QUICK_ROUNDS = 2, 3, 2
TARGETS = {"pixart": 1.6, "sd1": 1.3}
MEMORY = 0.35
GUIDANCE = 4.5
_SHOWN = 6


def pixart(quick: bool) -> tuple[nn.Module, Callable[[nn.Module, Tensor, int], Tensor], tuple[int, ...]]:
    """PixArt-α: 28 blocks (4 if `quick`) of 16 heads of 72, captions of 120 tokens of T5's width, 1024 patches."""
    network = PixArtTransformer2DModel(
        num_layers=4 if quick else 28, num_attention_heads=16, attention_head_dim=72, cross_attention_dim=1152,
        caption_channels=4096, sample_size=64, use_additional_conditions=False,
    )  # fmt: skip
    caption = torch.randn(2, 120, 4096, generator=torch.Generator().manual_seed(1))

    def predict(model: nn.Module, latents: Tensor, step: int) -> Tensor:
        time = torch.full((2,), step)
        added = {"resolution": None, "aspect_ratio": None}
        found: Tensor = model(latents, caption, time, added_cond_kwargs=added).sample.chunk(2, 1)[0]
        return found

    return network, predict, (1, 4, 64, 64)


def sd1(quick: bool) -> tuple[nn.Module, Callable[[nn.Module, Tensor, int], Tensor], tuple[int, ...]]:
    """Stable Diffusion 1's UNet, captions of 77 tokens of CLIP's width; of half the width, on 32×32, if `quick`."""
    widths = (160, 320, 640, 640) if quick else (320, 640, 1280, 1280)
    network = UNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=768,
        attention_head_dim=8,
        block_out_channels=widths,
        layers_per_block=1 if quick else 2,
    )
    caption = torch.randn(2, 77, 768, generator=torch.Generator().manual_seed(1))
    side = 32 if quick else 64

    def predict(model: nn.Module, latents: Tensor, step: int) -> Tensor:
        found: Tensor = model(latents, step, caption).sample
        return found

    return network, predict, (1, 4, side, side)


NETWORKS = {"pixart": pixart, "sd1": sd1}
COMPONENTS = {"pixart": "transformer", "sd1": "unet"}


def measure(name: str, quick: bool, threads: int) -> Iterator[dict[str, object]]:
    """A row for each number format."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network, predict, shape = NETWORKS[name](quick)
    network.requires_grad_(False).eval()
    copies = {"fp32": network}
    for quant in GRIDS:
        copies[quant] = deepcopy(network)
        quantize_network(copies[quant], COMPONENTS[name], quant)
    sizes = {quant: resident(name, quant, quick) for quant in copies}
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    taken: dict[str, list[float]] = {quant: [] for quant in copies}
    painted = {}
    for _ in range(QUICK_ROUNDS if quick else ROUNDS):
        for quant, copy in copies.items():
            started = time.perf_counter()
            painted[quant] = denoise(copy, predict, noise)
            taken[quant].append(time.perf_counter() - started)
    for quant in GRIDS:
        yield {
            "network": name,
            "threads": threads,
            "quant": quant,
            "fp32_s": statistics.median(taken["fp32"]),
            "ratio": statistics.median(base / own for base, own in zip(taken["fp32"], taken[quant], strict=True)),
            "memory": sizes[quant] / sizes["fp32"],
            "fp32_mib": sizes["fp32"] / 2**20,
            "error": float((painted[quant] - painted["fp32"]).norm() / painted["fp32"].norm()),
            "profile": profile(copies[quant], predict, noise),
        }


def denoise(network: nn.Module, predict: Callable[[nn.Module, Tensor, int], Tensor], noise: Tensor) -> Tensor:
    """The latents after `STEPS` steps."""
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(STEPS)
    latents = noise
    for step in scheduler.timesteps:
        free, asked = predict(network, torch.cat([latents, latents]), int(step)).chunk(2)
        latents = scheduler.step(free + GUIDANCE * (asked - free), step, latents).prev_sample
    return latents


def profile(network: nn.Module, predict: Callable[[nn.Module, Tensor, int], Tensor], noise: Tensor) -> dict[str, float]:
    """Operator → its own share of one pass's time, the largest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        predict(network, torch.cat([noise, noise]), 500)
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in events)
    return {event.key: round(event.self_cpu_time_total / whole, 3) for event in events[:_SHOWN]}


def resident(name: str, quant: str, quick: bool) -> int:
    """Bytes that the network takes in a process that makes it and rounds it in place."""
    with get_context("spawn").Pool(1) as pool:
        found: int = pool.apply(_grown, (name, quant, quick))
    return found


def _grown(name: str, quant: str, quick: bool) -> int:
    before = psutil.Process().memory_info().rss
    network, _, _ = NETWORKS[name](quick)
    if quant in GRIDS:
        quantize_network(network.requires_grad_(False), COMPONENTS[name], quant)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss) - before


def table(rows: list[dict[str, object]]) -> Table:
    """All rows, the targets beside them."""
    made = Table("network", "threads", "quant", "fp32 s", "ratio", "target", "memory", "target", "error", "profile")
    for row in rows:
        profile = ", ".join(f"{name.removeprefix('aten::')} {share:.0%}" for name, share in row["profile"].items())
        made.add_row(
            str(row["network"]), str(row["threads"]), str(row["quant"]), f"{row['fp32_s']:.2f}", f"{row['ratio']:.2f}",
            f"{TARGETS[str(row['network'])]}", f"{row['memory']:.2f}", f"{MEMORY}", f"{row['error']:.1e}", profile,
        )  # fmt: skip
    return made


@click.command()
@click.option("--quick", is_flag=True, help="Few blocks, small pictures, two rounds.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--isa", type=click.Choice(["avx2"]), help="Keep all libraries to these instructions.")
def main(quick: bool, as_json: bool, threads: int, isa: str | None) -> None:
    """Measure whole denoisers on quantized kernels against fp32."""
    keep_to(isa)
    with torch.no_grad():
        rows = [row for name in NETWORKS for row in measure(name, quick, threads)]
    machine = {"isa": native.isa(), "load": os.getloadavg()[0], "torch": torch.__version__}
    if as_json:
        click.echo(json.dumps({**machine, "results": rows}, indent=2))
        return
    Console(width=200).print(table(rows))
    click.echo(json.dumps(machine))


if __name__ == "__main__":
    main()
