"""Routes that change: repositories, commits, branches and tags."""

from __future__ import annotations

import base64
import binascii
import json
from functools import partial
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Body, Depends, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pathspec import GitIgnoreSpec
from pydantic import BaseModel, Field
from sqlmodel import Session, select

from modelgrove_hub.api.access import Caller, caller_of
from modelgrove_hub.api.bodies import lines, patiently
from modelgrove_hub.api.hf.answers import EntryNotFoundError, HubRoute, refusal
from modelgrove_hub.api.hf.entries import GITATTRIBUTES, LARGEST_REGULAR, entries_of, is_lfs
from modelgrove_hub.api.hf.repos import Reading, Repo, Writing, find_model, find_repo
from modelgrove_hub.api.problems import problem
from modelgrove_hub.errors import ConflictError, UsageError
from modelgrove_hub.formats.card import MAX_CARD, split_card
from modelgrove_hub.hub import Hub
from modelgrove_hub.ingest.committing import Change, Wanted, commit_changes
from modelgrove_hub.registry import models as registry
from modelgrove_hub.registry.blobs import name_blobs
from modelgrove_hub.registry.commits import Said, drop_ref, point, squash
from modelgrove_hub.registry.database import EVERYTHING
from modelgrove_hub.registry.events import record
from modelgrove_hub.registry.names import OWNER, check_name, clean_name
from modelgrove_hub.tables import Blob, Model, Ref, RefKind, Trust

router = APIRouter(route_class=HubRoute, include_in_schema=False)
Who = Annotated[Caller, Depends(caller_of)]
_LONGEST_LINE = LARGEST_REGULAR * 4 // 3 + 65536
_NOT_HELD = ("datasets", "spaces", "kernels", "buckets")
_MODELS_ONLY = "this hub holds models: it has no {kind}"


class RepoChoice(BaseModel):
    """The repository that a request is about."""

    name: str
    organization: str | None = None
    type: str | None = "model"
    private: bool | None = None
    visibility: Literal["public", "private", "protected"] | None = None

    @property
    def hidden(self) -> bool:
        """Whether it is to be private."""
        return bool(self.private) or self.visibility in ("private", "protected")

    def full_name(self, caller: Caller) -> str:
        """Owner and name; without an owner it is the caller's.

        Raises:
            UsageError: no model can be called so.
            HTTPException: 400, it is about something else than a model.
        """
        if self.type not in (None, "model"):
            raise HTTPException(400, _MODELS_ONLY.format(kind=f"{self.type}s"))
        owner = self.organization or (clean_name(caller.name).partition("/")[2] if caller.known else OWNER)
        return check_name(f"{owner}/{self.name}")


class Move(BaseModel):
    """Another name for a repository."""

    before: str = Field(alias="fromRepo")
    after: str = Field(alias="toRepo")
    type: str | None = "model"


@router.post("/api/repos/create")
def create_repo(request: Request, hub: Writing, caller: Who, choice: RepoChoice) -> Response:
    """Make a repository that holds no more than `.gitattributes`."""
    return _create(request, hub, caller, choice.full_name(caller), choice.hidden)


class Duplicate(BaseModel):
    """Where a copy of a repository is to be."""

    repository: str
    visibility: Literal["public", "private", "protected"] | None = None


@router.post("/api/models/{owner}/{name}/duplicate")
def duplicate(request: Request, hub: Writing, caller: Who, owner: str, name: str, wanted: Duplicate) -> Response:
    """Make a repository that holds what `main` of another one holds, in one commit; no byte is copied."""
    with hub.reading() as session:
        repo = find_repo(session, owner, name)
        changes = [Change(entry.path, entry.blob.sha256) for entry in entries_of(session, repo.revision)]
    target = check_name(wanted.repository)
    hidden = repo.model.private if wanted.visibility is None else wanted.visibility != "public"
    made = _create(request, hub, caller, target, hidden)
    if made.status_code == 200:
        commit_changes(hub, Wanted(target, changes, Said(f"Duplicate {repo.model.name}", author=caller.name)))
    return made


@router.delete("/api/repos/delete")
def delete_repo(hub: Writing, caller: Who, choice: RepoChoice) -> dict[str, bool]:
    """Forget a repository."""
    with hub.transaction() as session:
        registry.remove(session, find_model(session, *choice.full_name(caller).split("/")).name)
    return {"success": True}


@router.post("/api/repos/move")
def move_repo(hub: Writing, caller: Who, move: Move) -> dict[str, bool]:
    """Give a repository another name."""
    if move.type not in (None, "model"):
        raise HTTPException(400, _MODELS_ONLY.format(kind=f"{move.type}s"))
    with hub.transaction() as session:
        model = find_model(session, *check_name(move.before).split("/"))
        registry.rename(session, model, move.after, by=caller.name)
    return {"success": True}


@router.put("/api/models/{owner}/{name}/settings")
def change_settings(
    hub: Writing, caller: Who, owner: str, name: str,
    visibility: Annotated[Literal["public", "private", "protected"] | None, Body()] = None,
    private: Annotated[bool | None, Body()] = None, gated: Annotated[Literal["auto", "manual", False], Body()] = False,
) -> dict[str, Any]:  # fmt: skip
    """Show a repository to everybody, or to those with a token only."""
    if gated is not False:
        raise HTTPException(400, "models are not gated here: make it private, and give tokens to those who may see it")
    hidden = private if visibility is None else visibility != "public"
    with hub.transaction() as session:
        model = find_model(session, owner, name)
        if hidden is not None and hidden != model.private:
            model.private = hidden
            record(session, "changed", model.name, by=caller.name, private=hidden)
    return {"private": model.private, "gated": False}


class Preupload(BaseModel):
    """Files that a client is about to commit."""

    class File(BaseModel):
        """One of them; `sample` is its beginning in base64."""

        path: str
        size: int
        sample: str = ""

    files: list[File]
    ignored: str | None = Field(None, alias="gitIgnore")


@router.post("/api/models/{owner}/{name}/preupload/{revision:path}")
def preupload(hub: Reading, owner: str, name: str, revision: str, wanted: Preupload) -> dict[str, Any]:
    """How each file is to be sent, in the commit itself or before it by LFS, and which are ignored."""
    with hub.reading() as session:
        repo = find_repo(session, owner, name, revision)
        entries = {entry.path: entry for entry in entries_of(session, repo.revision)}
    ignored = GitIgnoreSpec.from_lines((wanted.ignored or "").splitlines())
    return {
        "files": [
            {
                "path": file.path, "uploadMode": "lfs" if is_lfs(file.path, file.size) else "regular",
                "shouldIgnore": ignored.match_file(file.path),
                **({"oid": entries[file.path].etag(hub, repo.model.name)} if file.path in entries else {}),
            }
            for file in wanted.files
        ]
    }  # fmt: skip


@router.post("/api/models/{owner}/{name}/commit/{revision:path}")
async def make_commit(
    request: Request, hub: Writing, caller: Who, owner: str, name: str, revision: str, create_pr: str = ""
) -> Response:
    """Commit what the body's lines say: a header, then files and deletions."""
    if create_pr:
        raise HTTPException(403, "there are no pull requests here: commit to a branch of its own instead")
    with hub.reading() as session:
        model = find_model(session, owner, name).name
    header: dict[str, Any] = {}
    changes = []
    async for line in lines(request, _LONGEST_LINE):
        key, value = _item(line)
        if key == "header":
            header = value
        elif key == "copyFile":
            changes.append(_copied(hub, owner, name, value, revision))
        else:
            changes.append(await to_thread.run_sync(partial(_change, hub, key, value)))
    said = Said(_text(header, "summary"), str(header.get("description") or ""), caller.name, revision)
    parent = header.get("parentCommit")
    if not isinstance(parent, str | None):
        raise UsageError("parentCommit is the id of a commit")
    wanted = Wanted(model, changes, said, parent)

    async def made() -> dict[str, Any]:
        done = await to_thread.run_sync(partial(commit_changes, hub, wanted))
        url = f"{request.base_url}{model}/commit/{done.id}"
        return {"success": True, "commitOid": done.id, "commitUrl": url, "hookOutput": "", "pullRequestUrl": None}

    return await patiently(made())


@router.post("/api/models/{owner}/{name}/super-squash/{branch:path}")
def squash_history(
    hub: Writing, caller: Who, owner: str, name: str, branch: str, message: Annotated[str, Body(embed=True)]
) -> Response:
    """Make a branch begin with what it holds now."""
    with hub.transaction() as session:
        repo = find_repo(session, owner, name, branch)
        squash(session, repo.model, branch, message, caller.name)
    return Response(status_code=200)


@router.post("/api/models/{owner}/{name}/branch/{branch:path}")
def create_branch(
    hub: Writing, caller: Who, owner: str, name: str, branch: str,
    startingPoint: Annotated[str | None, Body(embed=True)] = None,
) -> Response:  # fmt: skip
    """A branch at a revision, by default where `main` is."""
    with hub.transaction() as session:
        repo = find_repo(session, owner, name, startingPoint or "main")
        _name_commit(session, repo, RefKind.BRANCH, branch, caller)
    return Response(status_code=201)


@router.delete("/api/models/{owner}/{name}/branch/{branch:path}")
def delete_branch(hub: Writing, owner: str, name: str, branch: str) -> Response:
    """Forget a branch."""
    with hub.transaction() as session:
        drop_ref(session, find_model(session, owner, name), RefKind.BRANCH, branch)
    return Response(status_code=200)


@router.post("/api/models/{owner}/{name}/tag/{revision:path}")
def create_tag(
    hub: Writing, caller: Who, owner: str, name: str, revision: str, tag: Annotated[str, Body(embed=True)]
) -> Response:
    """Name a revision for good."""
    with hub.transaction() as session:
        _name_commit(session, find_repo(session, owner, name, revision), RefKind.TAG, tag, caller)
    return Response(status_code=201)


@router.delete("/api/models/{owner}/{name}/tag/{tag:path}")
def delete_tag(hub: Writing, owner: str, name: str, tag: str) -> Response:
    """Forget a tag."""
    with hub.transaction() as session:
        drop_ref(session, find_model(session, owner, name), RefKind.TAG, tag)
    return Response(status_code=200)


@router.post("/api/validate-yaml")
@router.post("/api/validate-yaml/")
def validate_card(content: Annotated[str, Body(embed=True)]) -> dict[str, list[dict[str, str]]]:
    """What is odd about a card's front matter. A broken one is kept as text, so nothing of it is an error."""
    fields, _ = split_card(content[:MAX_CARD])
    if fields:
        return {"errors": [], "warnings": []}
    return {"errors": [], "warnings": [{"message": "it has no front matter that can be read: no licence, no tags"}]}


@router.get("/api/{kind}")
@router.get("/api/{kind}/")
def other_lists(request: Request, kind: str) -> Response:
    """Lists of what this hub does not hold are empty."""
    return JSONResponse([]) if kind in _NOT_HELD else not_here(request, kind)


@router.api_route("/{kind}/{owner}/{name}/resolve/{rest:path}", methods=["GET", "HEAD"])
def other_files(request: Request, kind: str) -> Response:
    """Files of what this hub does not hold."""
    if kind not in _NOT_HELD:
        raise HTTPException(404, f"{request.url.path} is not offered by this hub: see docs/hub.md")
    return refusal(404, _MODELS_ONLY.format(kind=kind), "RepoNotFound")


@router.api_route("/api/{kind}/{rest:path}", methods=["GET", "POST", "PUT", "DELETE", "HEAD"])
def not_here(request: Request, kind: str) -> Response:
    """What a Hugging Face hub also has, and this one has not."""
    if kind == "v1":
        return problem(404, f"{request.method} {request.url.path} is nothing of this API: see {request.base_url}api/v1")
    if kind in _NOT_HELD:
        return refusal(404, _MODELS_ONLY.format(kind=kind), "RepoNotFound")
    return refusal(404, f"{request.method} {request.url.path} is not offered by this hub: see docs/hub.md")


def _item(line: bytes) -> tuple[str, dict[str, Any]]:
    try:
        item = json.loads(line)
        key, value = item["key"], item["value"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UsageError("a commit is lines of JSON, each with a key and a value") from None
    if not isinstance(key, str) or not isinstance(value, dict):
        raise UsageError("a commit's keys are texts and its values objects")
    return key, value


def _change(hub: Hub, key: str, value: dict[str, Any]) -> Change:
    path = _text(value, "path")
    if key == "file":
        try:
            content = base64.b64decode(_text(value, "content"), validate=True)
        except binascii.Error as error:
            raise UsageError(f"{path!a}: its content is not base64: {error}") from None
        return Change(path, hub.store.put_bytes(content).sha256)
    if key == "lfsFile":
        return Change(path, _text(value, "oid"))
    if key in ("deletedFile", "deletedFolder", "deletedEntry"):
        return Change(f"{path.rstrip('/')}/" if key == "deletedFolder" else path, None)
    raise UsageError(f"a commit cannot {key!a} here: it adds, copies and deletes")


def _copied(hub: Hub, owner: str, name: str, value: dict[str, Any], branch: str) -> Change:
    source, revision = _text(value, "srcPath"), value.get("srcRevision") or branch
    with hub.reading() as session:
        repo = find_repo(session, owner, name, str(revision))
        found = next((entry for entry in entries_of(session, repo.revision) if entry.path == source), None)
    if found is None:
        raise EntryNotFoundError(f"{owner}/{name} has no file {source!r} at {revision}")
    return Change(_text(value, "path"), found.blob.sha256)


def _text(value: dict[str, Any], field: str) -> str:
    found = value.get(field)
    if not isinstance(found, str):
        raise UsageError(f"a commit's item lacks {field!r}")
    return found


def _create(request: Request, hub: Hub, caller: Caller, name: str, private: bool) -> Response:
    url = f"{request.base_url}{name}"
    stored = hub.store.put_bytes(GITATTRIBUTES.encode())
    with hub.transaction() as session:
        if _is_there(session, name):
            return JSONResponse({"error": f"model {name} is there already", "url": url}, 409)
        name_blobs(session, [Blob(sha256=stored.sha256, size=stored.size)])
        model, revision, _ = registry.add_revision(
            session, name=name, files={".gitattributes": stored.sha256}, manifests={}, kind="unknown",
            family="unknown", adapter_type=None, declared_base=None, licence=None, tags=[], card="", trust=Trust.OK,
            summary={"reasons": ["it has no weights yet"]}, weights_hash=None, values_hash=None, inventory_hash=None,
            parameters=0, size=stored.size, said=Said("initial commit", author=caller.name),
        )  # fmt: skip
        model.private = private
        record(session, "created", name, by=caller.name, private=private, revision=revision.digest)
    return JSONResponse({"url": url, "name": name, "id": name})


def _is_there(session: Session, name: str) -> bool:
    # Also a private one that the caller does not see: its name is taken.
    query = select(Model.id).where(Model.name == name).execution_options(**{EVERYTHING: True})
    return session.exec(query).first() is not None


def _name_commit(session: Session, repo: Repo, kind: RefKind, name: str, caller: Caller) -> None:
    if session.get(Ref, (repo.model.id, kind, name)) is not None:
        raise ConflictError(f"{repo.model.name} has a {kind} {name!r} already")
    point(session, repo.model, kind, name, repo.commit)
    record(session, "named", repo.model.name, by=caller.name, commit=repo.commit.id, **{str(kind): name})
