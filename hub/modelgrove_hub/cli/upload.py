"""`modelgrove ingest --hub URL`: the models of this machine, uploaded to a hub over there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from modelgrove_hub.cli.place import TOKEN, ask, hub_url
from modelgrove_hub.errors import ModelgroveError, NotFoundError, StorageError
from modelgrove_hub.formats.texts import one_line
from modelgrove_hub.ingest.discover import Found, discover
from modelgrove_hub.ingest.pipeline import Ingested
from modelgrove_hub.registry.digest import digest_of
from modelgrove_hub.registry.names import clean_name
from modelgrove_hub.store.manifest import scan_bytes
from modelgrove_hub.verbs.facts import ModelDetail
from modelgrove_hub.verbs.models import show_model

_SUFFIX = 8


def upload(paths: Iterable[Path]) -> Iterator[Ingested]:
    """Upload every model under `paths`, one result for each; what the hub has is not sent again.

    A model whose name another content has over there gets a name with some of its own hash, as when it is registered
    here.

    Raises:
        StorageError: nobody answers at the URL.
    """
    for path in paths:
        for found in discover(path):
            if found.refused:
                yield _refused(found, found.refused)
                continue
            try:
                yield _sent(found)
            except StorageError:
                raise
            except ModelgroveError as error:
                yield _refused(found, str(error))


def _sent(found: Found) -> Ingested:
    digest = digest_of({path: scan_bytes(file).sha256 for path, file in found.files.items()})
    wanted = clean_name(found.name)
    for name in (wanted, f"{wanted}-{digest[:_SUFFIX]}"):
        there = _shown(name)
        if there is None:
            _send(found, name)
            return _result(found, "new", ask(show_model, model=name))
        if _content(there) == digest:
            return _result(found, "known", there)
    raise NotFoundError(f"{wanted} and {wanted}-{digest[:_SUFFIX]} have other content over there: rename it here")


def _shown(name: str) -> ModelDetail | None:
    try:
        return ask(show_model, model=name)
    except NotFoundError:
        return None


def _content(model: ModelDetail) -> str:
    """The digest of its files without what a hub adds to a new repository."""
    return digest_of({file.path: file.sha256 for file in model.files if file.path != ".gitattributes"})


def _send(found: Found, name: str) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(endpoint=hub_url(), token=os.environ.get(TOKEN) or False)
    operations = [CommitOperationAdd(path, file) for path, file in found.files.items()]
    try:
        api.create_repo(name)
        try:
            api.create_commit(name, operations, commit_message="Ingested")
        except BaseException:
            api.delete_repo(name)  # nothing half is left over there
            raise
    except HfHubHTTPError as error:
        reason = error.server_message or str(error).splitlines()[0]
        raise ModelgroveError(f"{hub_url()} refused {name}: {reason}") from error


def _refused(found: Found, reason: str) -> Ingested:
    return Ingested(one_line(str(found.root)), "refused", reason=one_line(reason))


def _result(found: Found, outcome: str, model: ModelDetail) -> Ingested:
    broken = model.content.summary.get("not_finite", {}).get("tensors", 0)
    facts = (model.name, model.kind, model.family, model.adapter_type, model.trust, broken)
    return Ingested(one_line(str(found.root)), outcome, *facts)
