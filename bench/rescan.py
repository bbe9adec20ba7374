"""What looking again costs: `python bench/rescan.py [--quick] [--json]`.

A LoRA is linked 100,000 times into 1,000 folders (`--quick`: 10,000 times into 100). Rows are written as a first run
would write them, without reading each link; then `source.folder` runs three times with nothing changed. Target: 10 s.

    seconds    on the clock, the fastest of the three
    peak_mb    the largest memory of the process
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import tempfile
import time
from importlib.resources import as_file, files
from pathlib import Path

import click
from sqlmodel import select

from modelgrove_hub.hub import Hub
from modelgrove_hub.ingest.discover import discover
from modelgrove_hub.jobs.run import run_local
from modelgrove_hub.settings import Settings
from modelgrove_hub.tables import Model, Source, SourceItem
from modelgrove_hub.verbs.sources import NewSource, Run, create_run, create_source
from modelgrove_migrations.run import upgrade

MANY, QUICK, IN_A_FOLDER = 100_000, 10_000, 100
LINKS = 10_000  # ext4 has 65,000 at most of one file


def grow(folder: Path, count: int) -> None:
    with as_file(files("modelgrove_analyzers.zoo") / "data/sample") as sample:
        lora = linked = next(sample.rglob("*.safetensors"))
        for number in range(count):
            place = folder / f"{number // IN_A_FOLDER:04}/{number:06}.safetensors"
            place.parent.mkdir(exist_ok=True)
            if number % LINKS == 0:
                shutil.copyfile(lora, place)
                linked = place
            else:
                os.link(linked, place)


def note(hub: Hub, folder: Path) -> None:
    with hub.transaction() as session:
        source = session.exec(select(Source)).one()
        rows = [Model(name=f"local/m{number}") for number in range(sum(1 for _ in discover(folder)))]
        session.add_all(rows)
        session.flush()
        for model, found in zip(rows, discover(folder), strict=True):
            session.add(SourceItem(source_id=source.id, key=found.key, stamp=found.stamp, model_id=model.id))


def run(hub: Hub) -> tuple[float, dict[str, int]]:
    began = time.monotonic()
    job = run_local(hub, create_run(hub, "links", Run(dry_run=True, key=None)).id)
    if job.error:
        raise click.ClickException(job.error)
    report = job.outputs["report"]
    return time.monotonic() - began, {what: number for what, number in report.items() if type(number) is int}


@click.command()
@click.option("--quick", is_flag=True)
@click.option("--json", "as_json", is_flag=True)
def main(quick: bool, as_json: bool) -> None:
    count = QUICK if quick else MANY
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp) / "links"
        folder.mkdir()
        grow(folder, count)
        hub = Hub.open(Settings(home=Path(temp) / "hub"))
        upgrade(hub.settings.database)
        create_source(hub, NewSource(name="links", url=str(folder), plugin="", schedule=""), local=True)
        note(hub, folder)
        runs = [run(hub) for _ in range(3)]
        hub.engine.dispose()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    figures = {"files": count, "seconds": min(runs)[0], "peak_mb": peak, "found": runs[0][1]}
    print(json.dumps(figures) if as_json else "\n".join(f"{name:8} {value}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
