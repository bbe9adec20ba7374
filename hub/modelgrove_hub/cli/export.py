"""`modelgrove export`: a model's files in a folder, as any other tool reads them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from modelgrove_hub.cli.output import dry_run_option, json_option, print_json, say
from modelgrove_hub.cli.work import open_hub, resolve
from modelgrove_hub.errors import UsageError


@click.command()
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--as", "form", metavar="FORMAT", help="dense, gguf or compressed-tensors; unset: the very files.")
@dry_run_option
@json_option
def export(model: str, folder: Path, form: str | None, dry_run: bool, as_json: bool) -> None:
    """Write MODEL into FOLDER, which must be new or empty: its very files, or in a format that others read."""
    from modelgrove_hub.exporting import check_free, get_exporter, publish_folder
    from modelgrove_hub.registry.inputs import load_input

    if form and dry_run:
        raise UsageError("--dry-run is for an export without --as: what becomes of a tensor is known once it is read")
    check_free(folder)
    hub = open_hub()
    source = load_input(hub, resolve(hub, [model])[0])
    if form:
        exporter = get_exporter(form)
        report = publish_folder(folder, lambda partial: exporter.run(source, partial))
        _tell(folder, report, as_json)
        return
    files = source.files()
    if not dry_run:
        publish_folder(folder, lambda partial: _copy(files, partial))
    if as_json:
        print_json({"folder": str(folder), "files": sorted(files)})
    else:
        say(f"{len(files)} files {'would go' if dry_run else 'are'} in {folder}")


def _tell(folder: Path, report: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json({"folder": str(folder), **report})
        return
    for line in report["remarks"]:
        say(line)
    say(f"{len(report['files'])} files are in {folder}")


def _copy(files: Mapping[str, Path], folder: Path) -> Mapping[str, Any]:
    for path, source in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return {}
