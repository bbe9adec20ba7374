"""`modelgrove copies`: which models are copies of which, and how we know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from modelgrove_hub.cli.output import json_option, print_json, say
from modelgrove_hub.cli.work import do, open_hub

if TYPE_CHECKING:
    from sqlmodel import Session

    from modelgrove_hub.hub import Hub
    from modelgrove_hub.tables import Model

_RELATIONS = {
    "exact copy": "copy",
    "re-saved copy": "copy",
    "renamed copy": "copy",
    "quantized copy": "quantized",
}
"""Verdicts that become edges of the lineage. A part is no copy, and what is undecided is no fact."""


@click.command()
@click.argument("model", required=False)
@click.option("--confirm/--no-confirm", default=True, show_default=True, help="Read suspects in full before judging.")
@json_option
def copies(model: str | None, confirm: bool, as_json: bool) -> None:
    """Find copies of MODEL, or among all models; what is found is recorded in the lineage."""
    hub = open_hub()
    with hub.reading() as session:
        inputs = _compared(session, model)
    params = {"first_only": model is not None, "confirm": confirm}
    report = do(hub, "analyzer.copies", params, inputs, local=True).outputs["report"]
    _record(hub, report["pairs"])
    if as_json:
        print_json(report)
        return
    for pair in report["pairs"]:
        click.echo(pair["text"])
    say(f"{len(report['pairs'])} pairs among {report['models']} models")


def _compared(session: Session, name: str | None) -> list[int]:
    """Revision ids: MODEL and all that could be its copies, or every model that may be read."""
    from modelgrove_hub.registry.models import find, latest_revision, list_models
    from modelgrove_hub.tables import Trust

    wanted = find(session, name) if name else None
    models = [
        m for m in list_models(session, trust=Trust.OK, limit=100_000) if wanted is None or _comparable(m, wanted)
    ]
    ordered = ([wanted] if wanted else []) + [m for m in models if wanted is None or m.id != wanted.id]
    return [number for m in ordered if (number := latest_revision(session, m).id) is not None]


def _comparable(model: Model, wanted: Model) -> bool:
    """A copy is of the same family as far as both are known: names may have been changed to hide it."""
    return "unknown" in (model.family, wanted.family) or model.family == wanted.family


def _record(hub: Hub, pairs: list[dict[str, Any]]) -> None:
    from modelgrove_hub.registry.lineage import add_edge
    from modelgrove_hub.tables import Relation, Revision

    with hub.transaction() as session:
        for pair in pairs:
            relation = _RELATIONS.get(pair["verdict"])
            child, parent = (session.get(Revision, pair[f"{side}_revision"]) for side in ("child", "parent"))
            if relation and child is not None and parent is not None:
                evidence = {**pair["evidence"], "text": pair["text"], "precision": pair["precision"]}
                add_edge(session, child, parent, Relation(relation), inferred=True, evidence=evidence)
