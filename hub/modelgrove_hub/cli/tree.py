"""`modelgrove tree`: the family of a checkpoint, drawn; which came from which, and how sure we are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from modelgrove_hub.cli.output import json_option, print_json, say
from modelgrove_hub.cli.place import ask
from modelgrove_hub.cli.work import at_once, do_work


@click.command()
@click.argument("model")
@click.option("--times/--no-times", default=True, show_default=True, help="Use when models were registered.")
@click.option("--confirm/--no-confirm", default=True, show_default=True, help="Read what sketches leave open.")
@click.option(
    "--limit",
    type=click.IntRange(1, 100_000),
    default=500,
    show_default=True,
    help="Checkpoints at most, the oldest first, and MODEL.",
)
@json_option
def tree(model: str, times: bool, confirm: bool, limit: int, as_json: bool) -> None:
    """Draw the checkpoints that share MODEL's base: who came from whom; what is found is recorded in the lineage.

    Registration within an hour says nothing of the order; then the distance from the root does.
    """
    from modelgrove_hub.verbs.lineage import TreeQuestion, plan_tree

    plan = ask(plan_tree, question=TreeQuestion(model=model, times=times, confirm=confirm, limit=limit))
    report = do_work(plan.work, **at_once()).outputs["report"]
    rows = [{**row, "declared": plan.declared[row["revision"]]} for row in report["models"]]
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
