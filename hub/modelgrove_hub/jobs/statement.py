"""Where a job's output comes from, as an in-toto statement v1 with the SLSA provenance v1 predicate (docs/trust.md)."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from modelgrove_hub.jobs.context import seed_of
from modelgrove_hub.plugins import PluginState
from modelgrove_hub.registry.digest import digest_of
from modelgrove_hub.registry.inputs import RegisteredModel
from modelgrove_hub.tables import Job, now

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD = "modelgrove:job/v1"
"""The kind of build that docs/trust.md describes: a job of a plugin."""
CONVERSION = "modelgrove:conversion/v1"
"""The other kind: the tensors of a pickle, written as safetensors when it was ingested."""
_VERSIONS = ("modelgrove", "torch", "numpy", "diffusers")


def make_statement(job: Job, plugin: PluginState, inputs: Sequence[RegisteredModel], files: Mapping[str, str]) -> bytes:
    """The statement about `files` (path in the model → sha256) that the job, which still runs, has written.

    The parameters are those of the job's row: what a plugin declares secret has never been in it.
    """
    predicate = {
        "buildDefinition": {
            "buildType": BUILD,
            "externalParameters": {"plugin": job.plugin, "params": job.params, "target": job.target},
            "internalParameters": {"seed": seed_of(job.idempotency_key), "attempt": job.attempts},
            "resolvedDependencies": [*_materials(inputs), _code(plugin)],
        },
        "runDetails": {
            "builder": {"id": f"modelgrove:worker/{job.owner}", "version": _versions()},
            "metadata": {
                "invocationId": job.id,
                "startedOn": job.started_at.isoformat() if job.started_at else None,
                "finishedOn": now().isoformat(),
            },
        },
    }
    return _statement(files, predicate)


def conversion_statement(
    name: str, hashes: Mapping[str, str], reports: Mapping[str, Any], files: Mapping[str, str]
) -> bytes:
    """The statement about `files` that were made of the pickles among the files (`hashes`) of the model `name`.

    `reports` has, by pickle, what its conversion left out.
    """
    predicate = {
        "buildDefinition": {
            "buildType": CONVERSION,
            "externalParameters": {},
            "internalParameters": {"pickles": dict(reports)},
            "resolvedDependencies": list(_files(name, hashes, "input")),
        },
        "runDetails": {
            "builder": {"id": f"modelgrove:ingest/{platform.node()}:{os.getpid()}", "version": _versions()},
            "metadata": {"finishedOn": now().isoformat()},
        },
    }
    return _statement(files, predicate)


def _statement(files: Mapping[str, str], predicate: Mapping[str, Any]) -> bytes:
    subject = [{"name": path, "digest": {"sha256": files[path]}} for path in sorted(files)]
    statement = {"_type": STATEMENT, "subject": subject, "predicateType": PREDICATE, "predicate": predicate}
    return json.dumps(statement, sort_keys=True).encode()


def _materials(inputs: Sequence[RegisteredModel]) -> Iterator[dict[str, Any]]:
    """Every file of every input, and of the bases that the plugin could read as well."""
    bases = {model.base.revision_id: model.base for model in inputs if model.base}
    for role, models in (("input", inputs), ("base", bases.values())):
        for model in models:
            yield from _files(model.name, model.hashes, role)


def _files(name: str, hashes: Mapping[str, str], role: str) -> Iterator[dict[str, Any]]:
    """A model's files as dependencies."""
    told = {"role": role, "model": name, "revision": digest_of(hashes)}
    for path, sha256 in sorted(hashes.items()):
        yield {"name": f"{name}/{path}", "digest": {"sha256": sha256}, "annotations": told}


def _code(plugin: PluginState) -> dict[str, Any]:
    """The distribution that the plugin is of, and the hash of the package that it is in."""
    package = (plugin.plugin.__module__ if plugin.plugin else "").partition(".")[0]
    known = _version(plugin.distribution)
    sources = {"sources": digest} if (digest := _sources(package)) else {}
    return {
        "uri": f"pkg:pypi/{plugin.distribution}@{known}",
        "annotations": {"distribution": plugin.distribution, "version": known, "package": package, **sources},
    }


@cache
def _sources(package: str) -> str:
    """`digest_of` the package's Python files as they are on disk; empty where it has none."""
    module = sys.modules.get(package)
    roots = [Path(root) for root in getattr(module, "__path__", ())]
    found = {file.relative_to(root).as_posix(): file for root in roots for file in root.rglob("*.py")}
    if not roots and (single := getattr(module, "__file__", None)):
        found = {Path(single).name: Path(single)}
    hashes = {path: hashlib.sha256(file.read_bytes()).hexdigest() for path, file in found.items()}
    return digest_of(hashes) if hashes else ""


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: _version(name) for name in _VERSIONS}}


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"
