"""`modelgrove export`: a model's files in a folder, as any other tool reads them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from modelgrove_hub.cli.output import dry_run_option, json_option, print_json, say
from modelgrove_hub.cli.place import ask, download, hub_url
from modelgrove_hub.cli.work import open_hub, resolve
from modelgrove_hub.errors import UsageError

if TYPE_CHECKING:
    from modelgrove_hub.contracts import InputModel
    from modelgrove_hub.hub import Hub

SIGNATURE = "model.sig"


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

    if form and dry_run:
        raise UsageError("--dry-run is for an export without --as: what becomes of a tensor is known once it is read")
    check_free(folder)
    with _source(model, fetch=not dry_run) as (source, signature):
        if form:
            exporter = get_exporter(form)
            _tell(folder, publish_folder(folder, lambda partial: exporter.run(source, partial)), as_json)
            return
        files = {**({SIGNATURE: signature} if signature else {}), **source.files()}
        if not dry_run:
            publish_folder(folder, lambda partial: _copy(files, partial))
    if as_json:
        print_json({"folder": str(folder), "files": sorted(files)})
    else:
        say(f"{len(files)} files {'would go' if dry_run else 'are'} in {folder}")


@contextmanager
def _source(model: str, *, fetch: bool) -> Iterator[tuple[InputModel, Path | None]]:
    """The model to read, and its newest signature; one of another hub is fetched into a folder that goes away."""
    if not hub_url():
        from modelgrove_hub.registry.inputs import load_input

        hub = open_hub()
        source = load_input(hub, resolve(hub, model))
        yield source, _signature(hub, source.revision_id)
        return
    from modelgrove_hub.registry.inputs import RegisteredModel
    from modelgrove_hub.tables import AttestationKind
    from modelgrove_hub.verbs.models import list_documents, show_model

    found = ask(show_model, model=model)
    documents = ask(list_documents, model=model, kind=AttestationKind.SIGNATURE)
    with TemporaryDirectory() as temporary:
        top = Path(temporary)
        paths = {file.path: top / "files" / file.path for file in found.files}
        for path, place in paths.items() if fetch else ():
            place.parent.mkdir(parents=True, exist_ok=True)
            download(f"/{found.name}/resolve/{found.revision}/{quote(path)}", place)
        signature = top / SIGNATURE if documents else None
        if signature:
            signature.write_text(documents[0].text, "utf-8")
        yield RegisteredModel(
            name=found.name, family=found.family, adapter_type=found.adapter_type, revision_id=found.content.id,
            summary=found.content.summary, card=found.card, tags=tuple(found.tags), paths=paths, base=None,
            hashes={file.path: file.sha256 for file in found.files},
        ), signature  # fmt: skip


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
