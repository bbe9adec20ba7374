"""What can be done with a model: forms made from plugins' parameters, and the prompt box of previews."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from modelgrove_hub.api.access import hub_for
from modelgrove_hub.contracts import Kind, Plugin
from modelgrove_hub.errors import NotFoundError, UsageError
from modelgrove_hub.hub import Hub
from modelgrove_hub.plugins import State, get_plugin, load_plugins
from modelgrove_hub.verbs.jobs import Work, submit_job
from modelgrove_hub.verbs.models import show_model
from modelgrove_hub.verbs.previews import Painting, paint
from modelgrove_hub.web.forms import Field, Filled, faults, fields_of, fill
from modelgrove_hub.web.render import model_url, page

router = APIRouter(include_in_schema=False)
Reading = Annotated[Hub, Depends(hub_for("read"))]
Writing = Annotated[Hub, Depends(hub_for("write"))]

KINDS = {
    Kind.ANALYZER: "Look closer", Kind.COMPRESSOR: "Make it smaller", Kind.MERGER: "Join it with others",
    Kind.VERIFIER: "Check whose it is", Kind.EDITOR: "Change it", Kind.PREVIEWER: "Paint with it",
}  # fmt: skip
"""Kinds of plugins that work on a model that is named."""
_MAKING = (Kind.COMPRESSOR, Kind.MERGER, Kind.EDITOR)
_MANY = (Kind.MERGER, Kind.ANALYZER, Kind.VERIFIER, Kind.EDITOR, Kind.PREVIEWER)
_LARGEST_FORM = 1 << 20


async def filled_in(request: Request) -> Filled:
    """What a form posted."""
    form = await request.form(max_files=0, max_fields=500, max_part_size=_LARGEST_FORM)
    filled = Filled()
    for name, value in form.multi_items():
        if isinstance(value, str):
            filled.setdefault(name, []).append(value)
    return filled


Posted = Annotated[Filled, Depends(filled_in)]


def offered(hub: Hub) -> dict[str, list[type[Plugin]]]:
    """Plugins that work on a model, by what they are good for."""
    found = [state.plugin for state in load_plugins(hub.settings) if state.state is State.OK and state.plugin]
    return {title: own for kind, title in KINDS.items() if (own := [plugin for plugin in found if plugin.kind == kind])}


@router.get("/m/{owner}/{name}/actions/{plugin}")
def form(request: Request, hub: Reading, owner: str, name: str, plugin: str, revision: str = "") -> HTMLResponse:
    """The form of one plugin."""
    found = _plugin(hub, plugin)
    return _form(
        request, hub, f"{owner}/{name}", revision, found, fields_of(found.Params.model_json_schema()), Filled()
    )


@router.post("/m/{owner}/{name}/actions/{plugin}")
def act(
    request: Request, hub: Writing, owner: str, name: str, plugin: str, posted: Posted, revision: str = ""
) -> Response:
    """Give the work to the workers, or show beside each field what does not fit."""
    found, full = _plugin(hub, plugin), f"{owner}/{name}"
    fields = fields_of(found.Params.model_json_schema())
    # Fields of the form itself have names that no parameter can have.
    values = fill(fields, posted)
    wrong = faults(found, values)
    for one in fields:
        one.error = wrong.pop(one.name, "")
    problem = "; ".join(f"{place}: {said}" if place else said for place, said in wrong.items())
    if not problem and not any(one.error for one in fields):
        others = [line.strip() for line in posted.one(":others").splitlines() if line.strip()]
        reference = f"{full}@{revision}" if revision else full
        work = Work(
            plugin=f"{found.kind}.{found.name}", params=values, models=[reference, *others],
            target=posted.one(":target") or None, key=None,
        )  # fmt: skip
        try:
            return RedirectResponse(f"/jobs/{submit_job(hub, work=work).id}", 303)
        except UsageError as error:
            problem = str(error)
    return _form(request, hub, full, revision, found, fields, posted, problem or "Some values do not fit.", 422)


@router.post("/m/{owner}/{name}/preview")
def preview(hub: Writing, owner: str, name: str, posted: Posted, revision: str = "") -> Response:
    """Have the model painted with, and show how it goes."""
    full = f"{owner}/{name}"
    params: dict[str, Any] = {"prompts": [line for line in posted.one("prompt").splitlines() if line.strip()]}
    for number in ("images", "seed", "steps"):
        if text := posted.one(number):
            params[number] = int(text) if text.isdigit() and len(text) < 19 else text
    job = paint(hub, painting=Painting(model=f"{full}@{revision}" if revision else full, params=params))
    return RedirectResponse(f"/jobs/{job.id}", 303)


def _plugin(hub: Hub, name: str) -> type[Plugin]:
    found = get_plugin(name, hub.settings)
    if found.kind not in KINDS:
        raise NotFoundError(
            f"{found.kind}.{found.name} works on no single model: see /plugins/{found.kind}.{found.name}"
        )
    return found


def _form(
    request: Request, hub: Hub, full: str, revision: str, plugin: type[Plugin], fields: list[Field], posted: Filled,
    problem: str = "", status: int = 200,
) -> HTMLResponse:  # fmt: skip
    model = show_model(hub, model=f"{full}@{revision}" if revision else full)
    return page(
        request, "action.html", status, tab="actions", nav="model", model=model, revision=revision, plugin=plugin,
        full_name=f"{plugin.kind}.{plugin.name}", fields=fields, problem=problem, quarantined=model.trust != "ok",
        others=posted.one(":others"), target=posted.one(":target"), makes=plugin.kind in _MAKING,
        takes_many=plugin.kind in _MANY, back=model_url(full, "actions"),
    )  # fmt: skip
