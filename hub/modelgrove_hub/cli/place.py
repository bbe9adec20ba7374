"""Where a command is answered: by the hub of this machine, or by the one at `--hub URL`."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, get_type_hints
from urllib.parse import quote

from modelgrove_hub.cli.work import open_hub
from modelgrove_hub.errors import (
    ConflictError,
    ModelgroveError,
    NotFoundError,
    PluginError,
    StorageError,
    UsageError,
)  # fmt: skip

if TYPE_CHECKING:
    import httpx2

    from modelgrove_hub.verbs.facts import JobFacts

HUB, TOKEN = "MODELGROVE_HUB", "MODELGROVE_TOKEN"
P = ParamSpec("P")
R = TypeVar("R")
_SECONDS = 600.0
_CHUNK = 1 << 20
_ERRORS: dict[int, type[ModelgroveError]] = {
    401: UsageError, 403: UsageError, 404: NotFoundError, 409: ConflictError, 422: UsageError, 502: PluginError,
}  # fmt: skip


def hub_url() -> str:
    """The address of the hub that is asked; empty for the one of this machine."""
    return os.environ.get(HUB, "").rstrip("/")


def ask(verb: Callable[..., R], **arguments: Any) -> R:
    """What the hub says to a verb, here or over there.

    Raises:
        ModelgroveError: as the verb raises it, from there too.
        StorageError: nobody answers at the URL, or the database here is not as this version needs it.
    """
    return _asked(verb, arguments) if hub_url() else verb(open_hub(), **arguments)


def ask_any(verb: Callable[..., R], **arguments: Any) -> R:
    """The same of a verb that a hub without a database answers too.

    Raises:
        ModelgroveError, StorageError: as `ask`.
    """
    from modelgrove_hub.hub import Hub

    return _asked(verb, arguments) if hub_url() else verb(Hub.open(), **arguments)


def only_here(what: str) -> None:
    """Refuse a command that is about this machine when another hub was named.

    Raises:
        UsageError: there is a --hub.
    """
    if hub_url():
        raise UsageError(f"{what} works on this machine: leave out --hub, or run it where {hub_url()} is")


def request(method: str, path: str, **kwargs: Any) -> httpx2.Response:
    """One request to the hub over there, its path below /api/v1; errors come back as they were raised.

    Raises:
        ModelgroveError: the hub says no.
        StorageError: nobody answers.
    """
    import httpx2

    try:
        answer = _client().request(method, f"{hub_url()}/api/v1{path}", **kwargs)
    except httpx2.HTTPError as error:
        raise StorageError(f"{hub_url()} does not answer: {error}") from error
    if answer.is_error:
        raise _error(answer)
    return answer


def copy_artefacts(job: JobFacts, folder: Path) -> dict[str, Path]:
    """The files that a job left, copied into a folder: where each is now."""
    folder.mkdir(parents=True, exist_ok=True)
    return {name: copy_artefact(job, name, folder / name) for name in job.outputs.get("artefacts", {})}


def copy_artefact(job: JobFacts, name: str, target: Path) -> Path:
    """One file that a job left, copied to `target`.

    Raises:
        NotFoundError: the job left no such file.
        StorageError: the hub over there does not answer.
    """
    sha256 = job.outputs.get("artefacts", {}).get(name)
    if sha256 is None:
        raise NotFoundError(f"job {job.id} ({job.plugin}) left no {name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not hub_url():
        return Path(shutil.copyfile(open_hub().store.path(sha256), target))
    return download(f"/api/v1/jobs/{job.id}/files/{quote(name)}", target)


def download(path: str, target: Path) -> Path:
    """What the hub over there has at a path, streamed into `target`.

    Raises:
        ModelgroveError: the hub says no.
        StorageError: nobody answers, or not all of it came.
    """
    import httpx2

    try:
        with _client().stream("GET", f"{hub_url()}{path}") as answer, target.open("wb") as out:
            if answer.is_error:
                answer.read()
                raise _error(answer)
            for chunk in answer.iter_bytes(_CHUNK):
                out.write(chunk)
    except httpx2.HTTPError as error:
        raise StorageError(f"{hub_url()}{path}: {error}") from error
    return target


def _asked(function: Callable[..., R], arguments: dict[str, Any]) -> R:
    from pydantic import BaseModel, TypeAdapter

    from modelgrove_hub.verbs.verb import verb_of

    verb = verb_of(function)
    values = {name: value for name, value in arguments.items() if value is not None}
    named = {name: values.pop(name) for name in re.findall(r"{(\w+)", verb.path)}
    path = re.sub(r"{(\w+)(:path)?}", lambda found: quote(str(named[found[1]]), safe="/@"), verb.path)
    bodies = [values.pop(name) for name, value in list(values.items()) if isinstance(value, BaseModel)]
    body = bodies[0].model_dump(mode="json") if bodies else None
    answer = request(verb.method, path, params=values, json=body)
    said: R = TypeAdapter(get_type_hints(function, include_extras=True)["return"]).validate_json(answer.content)
    return said


@cache
def _client() -> httpx2.Client:
    import httpx2

    token = os.environ.get(TOKEN)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx2.Client(headers=headers, timeout=_SECONDS)


def _error(answer: httpx2.Response) -> ModelgroveError:
    try:
        detail = answer.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = answer.text[:200] or answer.reason_phrase
    kind = _ERRORS.get(answer.status_code, StorageError)
    return kind(detail)
