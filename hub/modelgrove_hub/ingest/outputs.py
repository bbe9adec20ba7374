"""Register what a job made: its output folder becomes models, with their lineage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sqlmodel import Session

from modelgrove_hub.contracts import Output, Result
from modelgrove_hub.errors import PluginError
from modelgrove_hub.hub import Hub
from modelgrove_hub.ingest.discover import Found
from modelgrove_hub.ingest.prepare import prepare
from modelgrove_hub.ingest.register import Stored, register, store
from modelgrove_hub.jobs.statement import make_statement
from modelgrove_hub.plugins import find_plugin
from modelgrove_hub.registry.attestations import attest
from modelgrove_hub.registry.blobs import name_blobs
from modelgrove_hub.registry.inputs import RegisteredModel
from modelgrove_hub.registry.lineage import add_edge
from modelgrove_hub.registry.names import clean_name, free_name
from modelgrove_hub.tables import AttestationKind, Blob, Job, Model, Revision


@dataclass(frozen=True)
class StoredOutput:
    """An output whose bytes are in the blob store, waiting for its rows."""

    output: Output
    stored: Stored
    provenance: Blob
    """The statement of where it comes from."""


def store_outputs(
    hub: Hub, job: Job, result: Result, folder: Path, inputs: Sequence[RegisteredModel]
) -> list[StoredOutput]:
    """Hash, recognise and store every output of `result` under `folder`, and state where it comes from.

    Slow; no transaction is open.

    Raises:
        PluginError: an output names a file that was not written, or holds NaN or infinite values.
        DataError: an output is not a valid model file.
    """
    stored = []
    plugin = find_plugin(job.plugin, hub.settings)
    for output in result.outputs:
        prepared = prepare(_found(job, output, folder))
        if names := prepared.not_finite:
            raise PluginError(
                f"plugin {job.plugin!r} wrote NaN or infinite values into {len(names)} tensors, first {names[0]!a}: "
                "nothing was registered; check its inputs with `modelgrove show`"
            )
        kept = store(hub, prepared, "hardlink")
        statement = hub.store.put_bytes(make_statement(job, plugin, inputs, kept.files))
        stored.append(StoredOutput(output, kept, Blob(sha256=statement.sha256, size=statement.size)))
    return stored


def register_outputs(session: Session, job: Job, outputs: Sequence[StoredOutput]) -> list[str]:
    """Add rows and lineage edges of the outputs in the job's final transaction; returns the model names."""
    names = []
    inputs = [revision for revision in (session.get(Revision, number) for number in job.inputs) if revision is not None]
    parent = session.get(Model, inputs[0].model_id) if inputs else None
    for number, item in enumerate(outputs):
        wanted = job.target if job.target and number == 0 else item.output.name or _default_name(job, parent)
        name = free_name(session, clean_name(wanted), item.stored.files)
        model, revision, _ = register(session, item.stored, name, parent)
        if item.output.kind is not None:
            model.kind = item.output.kind
        model.tags = sorted({*model.tags, *item.output.tags})
        for source in inputs:
            evidence = {"job": job.id, "plugin": job.plugin, "params": job.params}
            add_edge(session, revision, source, item.output.relation, inferred=False, evidence=evidence)
        name_blobs(session, [item.provenance])
        attest(session, model, revision, AttestationKind.PROVENANCE, item.provenance.sha256)
        names.append(model.name)
    return names


def _found(job: Job, output: Output, folder: Path) -> Found:
    missing = [path for path in output.files if not (folder / path).is_file()]
    if missing or not output.files:
        raise PluginError(f"plugin {job.plugin!r} names an output it did not write: {missing or 'no files'}")
    if len(output.files) == 1:
        path = folder / output.files[0]
        return Found(path, {path.name: path}, output.name or path.stem, folder)
    root = _common(output.files)
    files = {str(PurePosixPath(path).relative_to(root)): folder / path for path in output.files}
    return Found(folder / root, files, output.name or job.plugin, folder)


def _common(paths: Sequence[str]) -> PurePosixPath:
    root = PurePosixPath(paths[0]).parent
    while not all(PurePosixPath(path).is_relative_to(root) for path in paths):
        root = root.parent
    return root


def _default_name(job: Job, parent: Model | None) -> str:
    method = job.plugin.rsplit(".", 1)[-1]
    return f"{parent.name}-{method}" if parent else method
