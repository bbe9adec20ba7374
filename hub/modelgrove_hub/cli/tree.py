"""`modelgrove tree`: the family of a checkpoint, drawn; which came from which, and how sure we are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from modelgrove_hub.cli.output import json_option, print_json, say
from modelgrove_hub.cli.work import do, open_hub

if TYPE_CHECKING:
    from sqlmodel import Session

    from modelgrove_hub.hub import Hub
    from modelgrove_hub.tables import Revision

_RELATIONS = {
    "fine-tune": "finetune",
    "LoRA merged in": "finetune",
    "merge": "merge",
    "exact copy": "copy",
    "re-saved copy": "copy",
    "renamed copy": "copy",
    "quantized copy": "quantized",
}
"""Verdicts that become edges of the lineage; what is undecided is no fact."""


@click.command()
@click.argument("model")
@click.option("--times/--no-times", default=True, show_default=True, help="Use when models were registered.")
@click.option("--confirm/--no-confirm", default=True, show_default=True, help="Read what sketches leave open.")
@click.option("--limit", default=500, show_default=True, help="Checkpoints at most, the oldest first, and MODEL.")
@json_option
def tree(model: str, times: bool, confirm: bool, limit: int, as_json: bool) -> None:
    """Draw the checkpoints that share MODEL's base: who came from whom; what is found is recorded in the lineage.

    Registration within an hour says nothing of the order; then the distance from the root does.
    """
    hub = open_hub()
    with hub.reading() as session:
        members, root = _members(session, model, limit)
        known = {member.id: _declared(session, member) for member in members}
    params: dict[str, Any] = {"confirm": confirm, "root": root}
    if times:
        params["times"] = [member.created_at.timestamp() for member in members]
    inputs = [member.id for member in members if member.id is not None]
    report = do(hub, "analyzer.tree", params, inputs, local=True).outputs["report"]
    rows = [{**row, "declared": known[row["revision"]]} for row in report["models"]]
    _record(hub, rows)
    if as_json:
        print_json({"models": rows})
        return
    for line in draw(rows):
        click.echo(line)
    say(
        f"{len(rows)} checkpoints; numbers are probabilities. Only what is called declared was told by a card or a job."
    )


def draw(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The lines of the tree: every model once, under its first parent."""
    below: dict[str | None, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        below[row["parents"][0] if row["parents"] else None].append(row)

    def lines(row: Mapping[str, Any], before: str, last: bool) -> Iterator[str]:
        yield f"{before}{'└─ ' if last else '├─ '}{_line(row)}"
        yield from branch(row["name"], before + ("   " if last else "│  "))

    def branch(name: str, before: str) -> Iterator[str]:
        for number, child in enumerate(below[name], 1):
            yield from lines(child, before, number == len(below[name]))

    for top in below[None]:
        yield _line(top)
        yield from branch(top["name"], "")


def _line(row: Mapping[str, Any]) -> str:
    told = str(row["verdict"])
    if row["verdict"] == "merge":
        told += " of " + " + ".join(f"{w:.2f} {name}" for w, name in zip(row["weights"], row["parents"], strict=True))
    sure = f" {row['probability']:.2f}" if row["parents"] else ""
    declared = f"; declared: {', '.join(row['declared'])}" if row["declared"] else ""
    return f"{row['name']}  ({told}{sure}{declared})"


def _members(session: Session, name: str, limit: int) -> tuple[list[Revision], int | None]:
    """The latest revisions of the checkpoints of the model's tree, and which of them is the root."""
    from modelgrove_hub.errors import UsageError
    from modelgrove_hub.registry.models import find, latest_revision
    from modelgrove_hub.registry.trees import checkpoints_of, find_root
    from modelgrove_hub.tables import NETWORKS

    wanted = find(session, name)
    if wanted.kind not in NETWORKS or wanted.tree is None:
        said = (wanted.tree_reason or {}).get("said", "it is no checkpoint")
        raise UsageError(f"{wanted.name} stands in no tree of checkpoints: {said}. See `modelgrove show {wanted.name}`")
    root = find_root(session, wanted.tree)
    members = {model.id: model for model in (wanted, *checkpoints_of(session, wanted.tree, limit))}
    first = root.id if root is not None else None
    ordered = sorted(members.values(), key=lambda member: (member.id != first, member.id))
    return [latest_revision(session, member) for member in ordered], 0 if first in members else None


def _declared(session: Session, revision: Revision) -> list[str]:
    """What cards and jobs say that the revision came from."""
    from modelgrove_hub.registry.lineage import parents

    return [
        f"{link.edge.relation} of {link.model.name}" for link in parents(session, revision) if not link.edge.inferred
    ]


def _record(hub: Hub, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace what was inferred before of the models: new members may stand between two others."""
    from modelgrove_hub.registry.lineage import add_edge, drop_inferred
    from modelgrove_hub.tables import Relation, Revision

    with hub.transaction() as session:
        for row in rows:
            child = session.get(Revision, row["revision"])
            relation = _RELATIONS.get(row["verdict"])
            if child is None:
                continue
            drop_inferred(session, child, (Relation.FINETUNE, Relation.MERGE))
            for number in row["parent_revisions"]:
                parent = session.get(Revision, number)
                if parent is not None and relation is not None:
                    evidence = {**row["evidence"], "text": row["text"]}
                    add_edge(
                        session, child, parent, Relation(relation), inferred=True, score=row["probability"],
                        evidence=evidence,
                    )  # fmt: skip
