"""`modelgrove export`: a model's files in a folder, as any other tool reads them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelgrove_hub.cli.output import dry_run_option, json_option, print_json, say
from modelgrove_hub.cli.work import open_hub, resolve
from modelgrove_hub.errors import UsageError

if TYPE_CHECKING:
    from modelgrove_hub.hub import Hub


@click.command()
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--as", "form", metavar="FORMAT", help="dense, gguf or compressed-tensors; unset: the very files.")
@dry_run_option
@json_option
def export(model: str, folder: Path, form: str | None, dry_run: bool, as_json: bool) -> None:
    """Write MODEL into FOLDER, which must be new or empty: its very files, or in a format that others read.

    A signature goes with the very files, as model.sig: the newest, if there are several.
    """
    from modelgrove_hub.exporting import check_free, get_exporter, publish_folder
    from modelgrove_hub.registry.attestations import SIGNATURE_FILE
    from modelgrove_hub.registry.inputs import load_input

    if form and dry_run:
        raise UsageError("--dry-run is for an export without --as: what becomes of a tensor is known once it is read")
    check_free(folder)
    hub = open_hub()
    source = load_input(hub, resolve(hub, [model])[0])
    signature = _signature(hub, source.revision_id)
    if form:
        exporter = get_exporter(form)
        report = publish_folder(folder, lambda partial: exporter.run(source, partial))
        _tell(folder, report, as_json)
        return
    files = {**({SIGNATURE_FILE: signature} if signature else {}), **source.files()}
    if not dry_run:
        publish_folder(folder, lambda partial: _copy(files, partial))
    if as_json:
        print_json({"folder": str(folder), "files": sorted(files)})
    else:
        say(f"{len(files)} files {'would go' if dry_run else 'are'} in {folder}")


def _signature(hub: Hub, revision_id: int) -> Path | None:
    from modelgrove_hub.registry.attestations import attestations_of
    from modelgrove_hub.tables import AttestationKind

    with hub.reading() as session:
        found = attestations_of(session, revision_id, AttestationKind.SIGNATURE)
    return hub.store.path(found[0]) if found else None


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
