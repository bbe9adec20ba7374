"""`modelgrove export`: a model's files in a folder, as any other tool reads them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import click

from modelgrove_hub.cli.output import dry_run_option, json_option, print_json, say
from modelgrove_hub.cli.work import open_hub, resolve
from modelgrove_hub.errors import ConflictError


@click.command()
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@dry_run_option
@json_option
def export(model: str, folder: Path, dry_run: bool, as_json: bool) -> None:
    """Copy MODEL's files into FOLDER, which must be new or empty."""
    from modelgrove_hub.registry.inputs import load_input

    if folder.exists() and any(folder.iterdir()):
        raise ConflictError(f"{folder} is not empty: name a new folder")
    hub = open_hub()
    files = load_input(hub, resolve(hub, [model])[0]).files()
    if not dry_run:
        _copy(files, folder)
    if as_json:
        print_json({"folder": str(folder), "files": sorted(files)})
    else:
        say(f"{len(files)} files {'would go' if dry_run else 'are'} in {folder}")


def _copy(files: dict[str, Path], folder: Path) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for path, source in files.items():
        target = partial / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    if folder.exists():
        folder.rmdir()
    os.replace(partial, folder)
