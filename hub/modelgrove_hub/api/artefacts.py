"""Files that jobs left, and files of models, for programs that know our API and not Hugging Face's."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import RedirectResponse

from modelgrove_hub.api.access import hub_for
from modelgrove_hub.api.files import file_response
from modelgrove_hub.errors import NotFoundError
from modelgrove_hub.hub import Hub
from modelgrove_hub.tables import Blob
from modelgrove_hub.verbs.jobs import show_job
from modelgrove_hub.verbs.models import show_model

router = APIRouter(tags=["files"])
Reading = Annotated[Hub, Depends(hub_for("read"))]


@router.get("/jobs/{job}/files/{name:path}", response_class=Response)
def job_file(request: Request, hub: Reading, job: str, name: str) -> Response:
    """A file that a job left: ranges, ETag."""
    sha256 = show_job(hub, job=job).outputs.get("artefacts", {}).get(name)
    found = hub.store.find(sha256) if sha256 else None
    if found is None:
        raise NotFoundError(f"job {job} left no file {name!r}")
    blob = Blob(sha256=found.sha256, size=found.size)
    return file_response(request, hub, blob, model=f"job {job}", path=name, etag=found.sha256, headers={})


@router.get("/files/{model:path}", response_class=RedirectResponse, status_code=307)
def model_file(hub: Reading, model: str, path: str) -> RedirectResponse:
    """A file of a model, by its path in it: where it is, with ranges and ETag.

    Raises:
        NotFoundError: there is no such model, or no such file in it.
    """
    found = show_model(hub, model=model)
    if path not in {file.path for file in found.files}:
        raise NotFoundError(f"{found.name} has no file {path!r}")
    return RedirectResponse(f"/{found.name}/resolve/{found.revision}/{path}", 307)
