"""Routes that only read: what models there are, what they hold, and their files."""

from __future__ import annotations

import json
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from sqlmodel import col, func, select

from modelgrove_hub.api.access import Caller, caller_of
from modelgrove_hub.api.files import file_response
from modelgrove_hub.api.hf.answers import EntryNotFoundError, HubRoute, RepoNotFoundError
from modelgrove_hub.api.hf.entries import Entry, entries_of, folder_facts, is_below, listed
from modelgrove_hub.api.hf.infos import detail_of, moment, only
from modelgrove_hub.api.hf.lists import Filters, shown
from modelgrove_hub.api.hf.repos import Reading, Repo, find_model, find_repo, heads_of, parts_after
from modelgrove_hub.errors import NotFoundError, UsageError
from modelgrove_hub.hub import Hub
from modelgrove_hub.registry.commits import history, refs_of
from modelgrove_hub.registry.inputs import place_of
from modelgrove_hub.store.header import read_header
from modelgrove_hub.tables import Commit, Model, RefKind, Trust

router = APIRouter(route_class=HubRoute, include_in_schema=False)
_MOST_LISTED, _LISTED, _READ, _TREE_PAGE, _COMMITS_PAGE = 1000, 100, 500, 1000, 50
Place = Annotated[int, Query(ge=0, le=1 << 40)]
_SORTS = {"createdAt": Model.created_at, "lastModified": Model.updated_at}


@router.get("/api/models")
def list_models(
    request: Request, hub: Reading, search: str = "", author: str = "", sort: str = "", limit: int = _LISTED,
    cursor: Place = 0, full: bool = False, config: bool = False, cardData: bool = False,
    filter: Annotated[list[str], Query()] = [], expand: Annotated[list[str], Query()] = [],  # noqa: A002, B006
    pipeline_tag: str = "", num_parameters: str = "", gated: bool = False, inference: str = "",
    inference_provider: Annotated[list[str], Query()] = [], apps: Annotated[list[str], Query()] = [],  # noqa: B006
) -> Response:  # fmt: skip
    """Models, newest first, or by the time that `sort` names; other orders are not kept here."""
    if gated or inference or inference_provider or apps:
        return JSONResponse([])  # no model here is gated, none is run for others, none says which programs take it
    filters = Filters.read(filter, pipeline_tag, num_parameters)
    size = max(1, min(limit, _MOST_LISTED))
    query = select(Model).order_by(col(_SORTS.get(sort, Model.created_at)).desc(), col(Model.id).desc())
    if search:
        query = query.where(func.lower(Model.name).contains(search.lower(), autoescape=True))
    if author:
        query = query.where(col(Model.name).startswith(f"{author}/", autoescape=True))
    more = None
    found: list[dict[str, Any]] = []
    chunk = _READ if filters.any() else size + 1
    with hub.reading() as session:
        for one in shown(session, hub, query, filters, cursor, chunk):
            if len(found) == size:
                more = {"cursor": str(one.at)}
                break
            facts = one.facts
            if full or config or cardData or expand:
                facts = detail_of(hub, one.model, one.commit, one.revision, entries_of(session, one.revision))
            found.append(only(facts, expand))
    return JSONResponse(found, headers=_next_page(request, more))


@router.get("/api/models/{owner}/{name}")
@router.get("/api/models/{owner}/{name}/revision/{revision:path}")
def model_info(
    hub: Reading, owner: str, name: str, revision: str = "main", blobs: bool = False, securityStatus: bool = False,
    expand: Annotated[list[str], Query()] = [],  # noqa: B006
) -> dict[str, Any]:  # fmt: skip
    """Everything about one model at a revision, or what `expand` names of it."""
    with hub.reading() as session:
        repo = find_repo(session, owner, name, revision)
        entries = entries_of(session, repo.revision)
    facts = detail_of(hub, repo.model, repo.commit, repo.revision, entries, blobs=blobs or securityStatus)
    return only(facts, expand)


@router.get("/api/models/{owner}/{name}/tree/{rest:path}")
def list_tree(
    request: Request, hub: Reading, owner: str, name: str, recursive: bool = False, expand: bool = False,
    cursor: Place = 0, limit: int = _TREE_PAGE,
) -> Response:  # fmt: skip
    """Files and folders of a revision, in or below a folder."""
    revision, *path = parts_after(request, "tree")
    folder = "/".join(path)
    with hub.reading() as session:
        repo = find_repo(session, owner, name, revision)
        entries = entries_of(session, repo.revision)
    if folder and not any(is_below(entry.path, folder) for entry in entries):
        raise EntryNotFoundError(f"{repo.model.name} has no folder {folder!r} at {revision}")
    found = listed(hub, repo.model.name, entries, folder, recursive=recursive)
    size = max(1, min(limit, _TREE_PAGE))
    page = [_expanded(one, repo) if expand else one for one in found[cursor : cursor + size]]
    more = {"cursor": str(cursor + size)} if len(found) > cursor + size else None
    return JSONResponse(page, headers={"X-Repo-Commit": repo.commit.id, **_next_page(request, more)})


async def _asked_paths(request: Request) -> tuple[list[str], bool]:
    """Paths and `expand` of a request: a form, as the Python client sends it, or JSON, as others do."""
    if request.headers.get("content-type", "").startswith("application/json"):
        try:
            asked = await request.json()
            paths, expand = asked["paths"], asked.get("expand", False)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise UsageError("what is asked for is an object with a list of paths") from None
    else:
        form = await request.form()
        paths, expand = form.getlist("paths"), str(form.get("expand", "")).lower() in ("true", "1")
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise UsageError("paths are a list of texts")
    return paths, bool(expand)


@router.post("/api/models/{owner}/{name}/paths-info/{revision:path}")
def paths_info(
    hub: Reading, owner: str, name: str, revision: str, asked: Annotated[tuple[list[str], bool], Depends(_asked_paths)]
) -> list[dict[str, Any]]:
    """Those of the paths that are there, files and folders."""
    paths, expand = asked
    with hub.reading() as session:
        repo = find_repo(session, owner, name, revision)
        entries = entries_of(session, repo.revision)
    by_path = {entry.path: entry for entry in entries}
    found = []
    for path in (each.strip("/") for each in paths):
        if path in by_path:
            found.append(by_path[path].facts(hub, repo.model.name))
        elif path and any(is_below(entry.path, path) for entry in entries):
            found.append(folder_facts(hub, repo.model.name, entries, path))
    return [_expanded(one, repo) for one in found] if expand else found


@router.get("/api/models/{owner}/{name}/refs")
def list_refs(hub: Reading, owner: str, name: str) -> dict[str, Any]:
    """Branches and tags."""
    with hub.reading() as session:
        refs = refs_of(session, find_model(session, owner, name))
    prefixes = {RefKind.BRANCH: "refs/heads/", RefKind.TAG: "refs/tags/"}
    named: dict[str, list[dict[str, str]]] = {kind: [] for kind in RefKind}
    for ref in refs:
        kind = RefKind(ref.kind)
        named[kind].append({"name": ref.name, "ref": prefixes[kind] + ref.name, "targetCommit": ref.commit_id})
    return {"branches": named[RefKind.BRANCH], "tags": named[RefKind.TAG], "converts": [], "pullRequests": []}


@router.get("/api/models/{owner}/{name}/commits/{revision:path}")
def list_commits(
    request: Request, hub: Reading, owner: str, name: str, revision: str, p: Place = 0, limit: int = _COMMITS_PAGE
) -> Response:
    """The commits that led to a revision, newest first."""
    with hub.reading() as session:
        commits = list(history(session, find_repo(session, owner, name, revision).commit))
    size = max(1, min(limit, _MOST_LISTED))
    page = [_commit(one) for one in commits[p * size : (p + 1) * size]]
    more = {"p": str(p + 1)} if len(commits) > (p + 1) * size else None
    return JSONResponse(page, headers={"X-Total-Count": str(len(commits)), **_next_page(request, more)})


@router.get("/api/models/{owner}/{name}/safetensors-metadata/{path:path}")
def safetensors_metadata(hub: Reading, owner: str, name: str, path: str) -> dict[str, Any]:
    """The index of a sharded model and the headers of its shards."""
    with hub.reading() as session:
        repo = find_repo(session, owner, name)
        entries = {entry.path: entry for entry in entries_of(session, repo.revision)}
    if path not in entries:
        raise EntryNotFoundError(f"{repo.model.name} has no file {path!r}")
    index = json.loads(place_of(hub, repo.model.name, path, entries[path].blob).read_bytes())
    folder = path.rpartition("/")[0]
    shards = sorted(set(map(str, index.get("weight_map", {}).values())))
    headers = {shard: _header(hub, repo, entries, f"{folder}/{shard}".strip("/")) for shard in shards}
    return {"index": {"metadata": index.get("metadata", {})}, "headers": headers}


@router.get("/api/models/{owner}/{name}/lfs-files")
def list_lfs_files(hub: Reading, owner: str, name: str) -> list[dict[str, Any]]:
    """The large files at the head of `main`."""
    with hub.reading() as session:
        repo = find_repo(session, owner, name)
        entries = entries_of(session, repo.revision)
    pushed = moment(repo.commit.created_at)
    return [
        {
            "fileOid": entry.blob.sha256, "filename": entry.path, "oid": entry.blob.sha256, "pushedAt": pushed,
            "ref": "main", "size": entry.blob.size,
        }
        for entry in entries if entry.lfs
    ]  # fmt: skip


@router.get("/api/models/{owner}/{name}/likers")
def list_likers(hub: Reading, owner: str, name: str) -> list[dict[str, str]]:
    """Nobody: there are no likes here."""
    with hub.reading() as session:
        find_model(session, owner, name)
    return []


@router.get("/api/models/{owner}/{name}/discussions")
def list_discussions(hub: Reading, owner: str, name: str) -> dict[str, Any]:
    """None: there are no discussions here."""
    with hub.reading() as session:
        find_model(session, owner, name)
    return {"discussions": [], "count": 0, "start": 0}


@router.get("/api/settings/repositories")
@router.get("/api/organizations/{owner}/settings/repositories")
def list_storage(hub: Reading, owner: str = "") -> list[dict[str, Any]]:
    """All models, or an owner's, with the bytes that each holds: models belong to nobody here."""
    query = select(Model).order_by(col(Model.name))
    if owner:
        query = query.where(col(Model.name).startswith(f"{owner}/", autoescape=True))
    with hub.reading() as session:
        models = session.exec(query).all()
        heads = heads_of(session, models)
    total = sum(revision.size for _, revision in heads.values()) or 1
    return [
        {
            "id": model.name, "type": "model", "visibility": "private" if model.private else "public",
            "updatedAt": moment(model.updated_at), "storage": (size := heads[model.id or 0][1].size),
            "storagePercent": round(100 * size / total, 2),
        }
        for model in models
    ]  # fmt: skip


@router.get("/api/models/{owner}/{name}/auth-check")
def auth_check(hub: Reading, owner: str, name: str) -> Response:
    """Whether the caller may read the model: an answer at all says yes."""
    with hub.reading() as session:
        find_model(session, owner, name)
    return PlainTextResponse("OK")


@router.get("/api/whoami-v2")
def whoami(caller: Annotated[Caller, Depends(caller_of)]) -> dict[str, Any]:
    """Who the token is of. Namespaces belong to nobody here, so there are no organisations."""
    if not caller.known:
        if not caller.scopes:
            raise UsageError("this hub demands a token")
        return {"type": "user", "id": "anonymous", "name": "anonymous", "fullname": "anonymous", "orgs": []}
    role = "write" if caller.may("write") else "read"
    return {
        "type": "user", "id": caller.name, "name": caller.name, "fullname": caller.name, "orgs": [],
        "auth": {"type": "access_token", "accessToken": {"displayName": caller.name, "role": role}},
    }  # fmt: skip


@router.get("/api/models-tags-by-type")
def tags_by_type(hub: Reading) -> dict[str, list[dict[str, str]]]:
    """Licences and tags in use."""
    with hub.reading() as session:
        said = session.exec(select(Model.licence).where(col(Model.licence).is_not(None)).distinct())
        licences = sorted(map(str, said))
        families = session.exec(select(Model.family).distinct()).all()
    return {
        "license": [
            {"id": f"license:{one}", "label": str(one), "type": "license"} for one in sorted(map(str, licences))
        ],
        "other": [{"id": one, "label": one, "type": "other"} for one in sorted(families)],
    }


@router.api_route("/{owner}/{name}/resolve/{rest:path}", methods=["GET", "HEAD"])
@router.api_route("/{owner}/{name}/raw/{rest:path}", methods=["GET", "HEAD"])
def resolve(request: Request, hub: Reading, owner: str, name: str) -> Response:
    """A file; under `raw` the pointer to it, if it is in LFS."""
    verb = request.url.path.split("/")[3]
    revision, *path = parts_after(request, verb)
    wanted = "/".join(path)
    with hub.reading() as session:
        repo = find_repo(session, owner, name, revision)
        found = next((entry for entry in entries_of(session, repo.revision) if entry.path == wanted), None)
    headers = {"X-Repo-Commit": repo.commit.id}
    if found is None:
        raise EntryNotFoundError(f"{repo.model.name} has no file {wanted!r} at {revision}", repo.commit.id)
    if verb == "raw" and found.lfs:
        return PlainTextResponse(found.pointer.decode(), headers=headers)
    etag = found.etag(hub, repo.model.name)
    if found.lfs:
        headers |= {"X-Linked-Size": str(found.blob.size), "X-Linked-Etag": f'"{etag}"'}
    if Trust.QUARANTINED in (repo.model.trust, repo.revision.summary.get("trust")):
        headers["X-Modelgrove-Trust"] = str(Trust.QUARANTINED)
    return file_response(
        request, hub, found.blob, model=repo.model.name, path=found.path, etag=etag, headers=headers
    )  # fmt: skip


@router.get("/api/models/{name}")
@router.api_route("/{name}/resolve/{rest:path}", methods=["GET", "HEAD"])
def without_owner(name: str) -> Response:
    """Nothing: every model here has an owner in its name."""
    raise RepoNotFoundError(f"no model {name[:100]!a} here: names are like owner/name")


def _next_page(request: Request, more: dict[str, str] | None) -> dict[str, str]:
    if more is None:
        return {}
    kept = [(name, value) for name, value in request.query_params.multi_items() if name not in more]
    url = request.url.replace(query=urlencode([*kept, *more.items()]))
    return {"Link": f'<{url}>; rel="next"'}


def _expanded(facts: dict[str, Any], repo: Repo) -> dict[str, Any]:
    commit = {"id": repo.commit.id, "title": repo.commit.title, "date": moment(repo.commit.created_at)}
    unsafe = Trust.QUARANTINED in (repo.model.trust, repo.revision.summary.get("trust"))
    status = {"status": "unsafe" if unsafe and "lfs" in facts else "safe", "avScan": None, "pickleImportScan": None}
    return {**facts, "lastCommit": commit, "securityFileStatus": status}


def _commit(one: Commit) -> dict[str, Any]:
    return {
        "id": one.id, "title": one.title, "message": one.message, "date": moment(one.created_at),
        "authors": [{"user": one.author}] if one.author else [],
    }  # fmt: skip


def _header(hub: Hub, repo: Repo, entries: dict[str, Entry], path: str) -> dict[str, Any]:
    if path not in entries:
        raise NotFoundError(f"{repo.model.name} has no shard {path!r}")
    header = read_header(place_of(hub, repo.model.name, path, entries[path].blob))
    tensors = {
        one.name: {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": [one.start, one.end]}
        for one in header.tensors
    }
    return {**tensors, **({"__metadata__": header.metadata} if header.metadata else {})}
