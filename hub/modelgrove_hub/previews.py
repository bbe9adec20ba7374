"""Rendered previews: a cache by recipe, and which base an adapter is previewed on.

The cache is a folder of PNG files, each named by what decides the picture: the content of the
models, the parameters and the versions of the libraries that paint. Losing it costs time only.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sqlmodel import Session

from modelgrove_hub.errors import NotFoundError, UsageError
from modelgrove_hub.registry.lineage import parents
from modelgrove_hub.registry.models import find_revision, latest_revision, list_models
from modelgrove_hub.settings import Settings
from modelgrove_hub.store.disk import create_temporary, open_regular, publish
from modelgrove_hub.tables import Model, ModelKind, Relation, Revision, Trust

_DECIDING = ("modelgrove", "torch", "diffusers", "transformers")
_KEY = re.compile(r"[0-9a-f]{64}")
_SHOWN = 5


def preview_key(plugin: str, params: Mapping[str, Any], revisions: Sequence[str]) -> str:
    """The name of a preview: a sha256 over plugin, parameters, the revisions' digests and library versions.

    Digests and not weight hashes, because an adapter's alpha may stand in a JSON file beside its weights.
    """
    recipe = [plugin, params, list(revisions), {package: version(package) for package in _DECIDING}]
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def job_key(name: str, revision_ids: Sequence[int]) -> str:
    """The idempotency key of the job that paints preview `name`: after an upgrade it is another job.

    The ids are in it because copies of a model share the preview's name, and are other inputs.
    """
    return hashlib.sha256(f"{name} {list(revision_ids)}".encode()).hexdigest()


def get(settings: Settings, key: str) -> Path | None:
    """The cached picture, if there is one."""
    path = _path(settings, key)
    return path if path.is_file() else None


def put(settings: Settings, key: str, picture: Path) -> Path:
    """Copy `picture` into the cache; readers see all of it or nothing.

    Raises:
        NotFoundError: the picture is gone.
        StorageError: the cache cannot be written.
    """
    target = _path(settings, key)
    file, temporary = create_temporary(target.parent)
    try:
        with file, open_regular(picture) as source:
            shutil.copyfileobj(source, file)
            publish(file, temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def find_base(session: Session, model: Model) -> Revision:
    """The base that the adapter `model` is shown on.

    Looked for among its parents, then the bases that its card or its recognition name, then
    the registered checkpoints of its family that come from no other.

    Raises:
        NotFoundError: there is no such base here.
        UsageError: several are possible; the message lists them.
    """
    revision = latest_revision(session, model)
    for link in parents(session, revision):
        if link.edge.relation == Relation.ADAPTER and link.model.kind != ModelKind.ADAPTER:
            return link.revision
    for name in filter(None, (model.declared_base, *revision.summary.get("base_candidates", ()))):
        try:
            return find_revision(session, name)
        except (NotFoundError, UsageError):
            continue  # a name that means nothing here, or not one thing: look further
    found = list(_roots(session, model.family))
    if len(found) == 1:
        return latest_revision(session, found[0])
    if not found:
        raise NotFoundError(
            f"{model.name} is an adapter, and no base of family {model.family!r} is registered: "
            "ingest its base, or name one: modelgrove preview BASE --lora ADAPTER"
        )
    names = ", ".join(base.name for base in found[:_SHOWN])
    raise UsageError(f"{model.name} may belong to {names}: say which: modelgrove preview BASE --lora {model.name}")


def _roots(session: Session, family: str) -> Iterable[Model]:
    bases = list_models(session, kind=ModelKind.CHECKPOINT, family=family, trust=Trust.OK, limit=1000)
    return (base for base in bases if not parents(session, latest_revision(session, base)))


def _path(settings: Settings, key: str) -> Path:
    if not _KEY.fullmatch(key):
        raise UsageError(f"{key!r} is no preview key")
    return settings.previews / key[:2] / f"{key}.png"
