"""How fast commands answer in a new process: `python bench/cli.py [--quick] [--json]`.

Every command is run several times on a hub with the shipped sample, files in the page cache.
Targets: `--help` 0.3 s, `ls` and `show` 1 s.

    s          least time on the clock; on a busy machine look at cpu_s instead
    cpu_s      least CPU time
    x_python   cpu_s over the CPU time of an empty Python program
    heavy      heavy libraries that were imported; `--help`, `ls` and `show` must have none
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

RUNS, QUICK_RUNS = 10, 2
MODELS, QUICK_MODELS = 134, 20
HEAVY = ("torch", "transformers", "sentence_transformers", "sklearn", "scipy", "faiss", "celery", "numpy")
MODELGROVE = ("-m", "modelgrove_hub")


def python(arguments: Sequence[str]) -> tuple[float, float, str]:
    """Clock and CPU seconds of a Python process, and what it said on stderr."""
    with tempfile.TemporaryFile("w+") as said:
        started = time.monotonic()
        process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        said.seek(0)
        text = said.read()
    if status:
        raise click.ClickException(f"{' '.join(arguments)} failed: {text[-500:]}")
    return seconds, used.ru_utime + used.ru_stime, text


def measure(command: Sequence[str], runs: int, empty: float) -> dict[str, float | str]:
    _, _, said = python(["-X", "importtime", *MODELGROVE, *command])  # also brings files into the page cache
    imported = set(re.findall(r"\| *(\w+)$", said, re.MULTILINE))
    timed = [python([*MODELGROVE, *command]) for _ in range(runs)]
    cpu = min(cpu for _, cpu, _ in timed)
    return {
        "s": min(seconds for seconds, _, _ in timed),
        "cpu_s": cpu,
        "x_python": cpu / empty,
        "heavy": " ".join(name for name in HEAVY if name in imported),
    }


def fill(home: Path, count: int) -> str:
    """Make a hub of `count` models of the sample, with their card vectors; the name of one."""
    os.environ["MODELGROVE_HOME"] = str(home)
    with as_file(files("modelgrove_analyzers.zoo") / "data/sample") as sample:
        folders = sorted(path for path in sample.iterdir() if path.is_dir())[:count]
        python([*MODELGROVE, "init"])
        python([*MODELGROVE, "ingest", *map(str, folders)])
        python([*MODELGROVE, "expert", "embed"])
    return f"local/{folders[0].name}"


@click.command()
@click.option("--quick", is_flag=True, help=f"{QUICK_RUNS} runs instead of {RUNS}, {QUICK_MODELS} models.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def main(quick: bool, as_json: bool) -> None:
    """Measure how fast commands start and answer."""
    runs = QUICK_RUNS if quick else RUNS
    with tempfile.TemporaryDirectory() as temporary:
        model = fill(Path(temporary), QUICK_MODELS if quick else MODELS)
        commands = {"--help": ["--help"], "ls": ["ls"], "show": ["show", model], "search": ["search", "a cat"]}
        empty = min(python(["-c", ""])[1] for _ in range(runs))
        results = {name: measure(command, runs, empty) for name, command in commands.items()}
    if as_json:
        click.echo(json.dumps({"load": os.getloadavg()[0], "commands": results}, indent=2))
        return
    table = Table("command", *results["ls"], title=f"least of {runs} runs, load {os.getloadavg()[0]:.1f}")
    for name, row in results.items():
        table.add_row(name, *(f"{value:.2f}" if isinstance(value, float) else value for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
