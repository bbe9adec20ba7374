"""What ingesting small LoRAs costs: `python bench/ingest.py [--quick] [--json] [--postgres URL]`.

1,000 LoRAs are made by perturbing the shipped sample, and `modelgrove ingest --workers 2` registers
them twice in a new hub: on SQLite, and on PostgreSQL if a server is given (a schema of its own,
dropped afterwards). Jobs and their broker have no part in ingestion. Targets: 60 s, 1,000 MB.

    s          time on the clock; on a busy machine look at cpu_s instead
    cpu_s      CPU time of all processes
    ms_each    CPU time a model, in milliseconds
    peak_mb    the largest memory of any of the processes
    x_sha256   cpu_s over the CPU time that `sha256sum` takes for the same files
    again_s    cpu_s of the second run, which finds every model known
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from uuid import uuid4

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.numpy import save_file
from sqlalchemy import create_engine, make_url

MODELS, QUICK_MODELS = 1000, 100
WORKERS = 2
NOISE = 0.01
MODELGROVE = (sys.executable, "-m", "modelgrove_hub")


def grow(folder: Path, count: int) -> None:
    """Write `count` LoRAs: those of the sample, each number changed by about one per cent."""
    rng = np.random.default_rng(0)
    with as_file(files("modelgrove_analyzers.zoo") / "data/sample") as sample:
        sources = itertools.cycle(sorted(path for path in sample.iterdir() if path.is_dir()))
        for number, source in zip(range(count), sources, strict=False):
            target = folder / f"{source.name}-{number:04}"
            shutil.copytree(source, target)
            for weights in target.glob("*.safetensors"):
                perturb(weights, rng)


def perturb(path: Path, rng: np.random.Generator) -> None:
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    for name, values in tensors.items():
        changed = values * (1 + NOISE * rng.standard_normal(values.shape))
        tensors[name] = np.asarray(changed, values.dtype)
    save_file(tensors, path, metadata)


def run(command: Sequence[str], **environment: str) -> dict[str, float]:
    """Run to the end: clock and CPU seconds, and the peak memory of its largest process."""
    started = time.monotonic()
    process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise click.ClickException(f"{' '.join(command[:4])} failed: {status}")
    return {
        "s": time.monotonic() - started,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_mb": used.ru_maxrss * 1024 / 1e6,  # Linux counts KiB
    }


def measure(lora_folder: Path, count: int, home: Path, database: str) -> dict[str, float]:
    where = {"MODELGROVE_HOME": str(home), "MODELGROVE_DATABASE_URL": database}
    run([*MODELGROVE, "init"], **where)
    ingest = [*MODELGROVE, "ingest", str(lora_folder), "--workers", str(WORKERS)]
    first, again = run(ingest, **where), run(ingest, **where)
    plain = run(["sha256sum", *map(str, lora_folder.rglob("*.safetensors"))])
    return {
        "models": count,
        **first,
        "ms_each": 1000 * first["cpu_s"] / count,
        "x_sha256": first["cpu_s"] / plain["cpu_s"],
        "again_s": again["cpu_s"],
        "load": os.getloadavg()[0],
    }


@contextmanager
def schema(server: str) -> Iterator[str]:
    """The URL of a new schema on the server, dropped afterwards."""
    name = f"bench_{uuid4().hex[:8]}"
    engine = create_engine(make_url(server).set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {name}")
    try:
        yield f"{server}?options=-csearch_path%3D{name}"
    finally:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"DROP SCHEMA {name} CASCADE")


@click.command()
@click.option("--quick", is_flag=True, help=f"{QUICK_MODELS} models instead of {MODELS}.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--postgres", metavar="URL", help="A server to measure too: postgresql://user@host/database.")
def main(quick: bool, as_json: bool, postgres: str | None) -> None:
    """Measure the ingestion of small LoRAs."""
    count = QUICK_MODELS if quick else MODELS
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        grow(place / "loras", count)
        results = {"sqlite": measure(place / "loras", count, place / "sqlite", "")}
        if postgres:
            with schema(postgres) as url:
                results["postgresql"] = measure(place / "loras", count, place / "postgresql", url)
    if as_json:
        click.echo(json.dumps({"workers": WORKERS, "databases": results}, indent=2))
        return
    table = Table("measure", *results, title=f"{count:,} LoRAs, {WORKERS} workers")
    for name in results["sqlite"]:
        table.add_row(name, *(f"{result[name]:,.1f}" for result in results.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
