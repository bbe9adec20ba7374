"""What one new LoRA costs until search finds it, in a worker that is warm: `python bench/embed.py [--quick] [--json]`.

A hub with the zoo's base and the shipped sample, and an expert fitted on these; then new LoRAs, the sample's with each
number changed by about one per cent, come one by one. Medians of CPU milliseconds on one thread; the first of all is
not counted, as it imports and opens.

    ingest_ms  read, recognise and register it, and decide its tree
    embed_ms   place it by the expert and write its vector: from then on it is searchable (target: 100)
    search_ms  the next search, which takes the new vector into the index
"""

from __future__ import annotations

import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import click
import torch
from ingest import grow
from rich.console import Console
from rich.table import Table
from search import BASE, SAMPLE

from modelgrove_hub.cli.root import modelgrove
from modelgrove_hub.hub import Hub
from modelgrove_hub.ingest.pipeline import ingest
from modelgrove_hub.search.embedding import embed_missing
from modelgrove_hub.search.query import search
from modelgrove_hub.settings import Settings

LORAS, QUICK_LORAS = 40, 5
QUERY = "a violin"


def milliseconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return 1000 * (time.process_time() - started)


def prepare(home: Path, quick: bool) -> Hub:
    """A hub with an expert; in quick runs the base is not asked for words, which changes what placing costs little."""
    fit = ["expert", "fit", "--tree", "zoo", "--local", *(["--no-ask"] if quick else [])]
    with redirect_stdout(io.StringIO()):
        for arguments in (["init"], ["ingest", str(BASE), str(SAMPLE)], fit):
            modelgrove.main(["--home", str(home), *arguments], standalone_mode=False)
    return Hub.open(Settings(home=home))


def measure(hub: Hub, loras: Path) -> dict[str, float]:
    found: dict[str, list[float]] = {"ingest_ms": [], "embed_ms": [], "search_ms": []}
    for lora in sorted(loras.iterdir()):
        found["ingest_ms"].append(milliseconds(partial(list, ingest(hub, [lora], "reference"))))
        found["embed_ms"].append(milliseconds(partial(embed_missing, hub)))
        found["search_ms"].append(milliseconds(partial(search, hub, QUERY, "weights")))
    return {name: statistics.median(values[1:]) for name, values in found.items()}


@click.command()
@click.option("--quick", is_flag=True, help=f"{QUICK_LORAS} LoRAs instead of {LORAS}, without asking the base.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def main(quick: bool, as_json: bool) -> None:
    """Measure what one new LoRA costs until search finds it."""
    torch.set_num_threads(1)
    count = QUICK_LORAS if quick else LORAS
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        grow(place / "loras", count)
        result = {"loras": count, **measure(prepare(place / "hub", quick), place / "loras"), "load": os.getloadavg()[0]}
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    table = Table("measure", "median", title=f"{count} new LoRAs, one by one")
    for name, value in result.items():
        table.add_row(name, f"{value:,.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
