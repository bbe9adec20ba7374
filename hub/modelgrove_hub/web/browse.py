"""Pages to find models: search, the newest ones, and the atlas."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import HTMLResponse

from modelgrove_hub.api.access import hub_for
from modelgrove_hub.errors import UsageError
from modelgrove_hub.hub import Hub
from modelgrove_hub.registry.models import find
from modelgrove_hub.tables import Trust
from modelgrove_hub.verbs.atlas import atlas
from modelgrove_hub.verbs.facets import Facets, facets
from modelgrove_hub.verbs.models import list_models
from modelgrove_hub.verbs.search import search
from modelgrove_hub.web.faces import faces
from modelgrove_hub.web.render import page

router = APIRouter(include_in_schema=False)
Reading = Annotated[Hub, Depends(hub_for("read"))]
Text = Annotated[str, Query(max_length=2000)]
Facet = Annotated[str, Query(max_length=200)]

FACETS = {
    "kind": "Kind", "family": "Family", "adapter_type": "Type", "base": "Base", "licence": "Licence", "trust": "Trust",
}  # fmt: skip
BYS = {"both": "Both", "weights": "Weights", "card": "Card"}
_FOUND = 30
_PAGE = 24


@router.get("/")
def home(
    request: Request, hub: Reading, q: Text = "", by: str = "both", kind: Facet = "", family: Facet = "",
    adapter_type: Facet = "", base: Facet = "", licence: Facet = "", rank: Facet = "", trust: Facet = "",
    after: str = "",
) -> HTMLResponse:  # fmt: skip
    """Search, and the newest models where nothing is asked for."""
    chosen = {"kind": kind, "family": family, "adapter_type": adapter_type, "base": base, "licence": licence,
              "trust": trust}  # fmt: skip
    there = facets(hub)
    found: dict[str, Any] = {"answer": None, "models": None, "problem": ""}
    filters: dict[str, Any] = {name: value or None for name, value in chosen.items()}
    filters["trust"] = Trust(trust) if trust in list(Trust) else None
    try:
        if q.strip():
            side: Any = by if by in BYS else "both"
            found["answer"] = search(hub, text=q, by=side, limit=_FOUND, rank=rank or None, **filters)
            names = [hit.name for hit in found["answer"].hits]
        else:
            start = after if after.isdigit() and len(after) < 19 else None
            found["models"] = list_models(hub, limit=_PAGE, after=start, **filters)
            names = [model.name for model in found["models"].items]
    except UsageError as error:
        names, found["problem"] = [], str(error)
    shown = {"q": q, "by": by if by in BYS else "both", "rank": rank, "chosen": chosen}
    context = shown | found | {"facets": _offered(there, chosen), "total": there.models, "faces": faces(hub, names)}
    return page(request, "search.html", FACETS=FACETS, BYS=BYS, nav="search", **context)


@router.get("/atlas")
def map_of_models(request: Request, hub: Reading) -> HTMLResponse:
    """The map of all models, and without JavaScript the list by tree."""
    made = atlas(hub)
    groups: dict[str, list[str]] = {}
    for name, tree in zip(made.names, made.tree, strict=True):
        groups.setdefault(tree or "no tree", []).append(name)
    return page(request, "atlas.html", nav="atlas", atlas=made, groups=groups)


@router.get("/atlas/model")
def on_the_map(request: Request, hub: Reading, name: Annotated[str, Query(max_length=200)]) -> HTMLResponse:
    """What the atlas shows of the model under the pointer."""
    with hub.reading() as session:
        model = find(session, name)
    return page(request, "atlas_model.html", model=model, face=faces(hub, [model.name]).get(model.name))


@router.get("/atlas/faces")
def pictures(hub: Reading, name: Annotated[list[str], Query(max_length=60)]) -> dict[str, str]:
    """Previews of models that the atlas shows, where there are any."""
    return {known: face.picture for known, face in faces(hub, name).items() if face.picture}


def _offered(there: Facets, chosen: dict[str, str]) -> dict[str, dict[str, int]]:
    """The values of each facet that says something: more than one value, or one that is chosen."""
    counts = {name: dict(getattr(there, name)) for name in FACETS}
    for name, value in chosen.items():
        if value:
            counts[name].setdefault(value, 0)
    return {name: values for name, values in counts.items() if len(values) > 1 or chosen[name]}
