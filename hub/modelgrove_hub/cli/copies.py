"""`modelgrove copies`: which models are copies of which, and how we know."""

from __future__ import annotations

import click

from modelgrove_hub.cli.output import json_option, print_json, say
from modelgrove_hub.cli.place import ask
from modelgrove_hub.cli.work import at_once, do_work


@click.command()
@click.argument("model", required=False)
@click.option("--confirm/--no-confirm", default=True, show_default=True, help="Read suspects in full before judging.")
@json_option
def copies(model: str | None, confirm: bool, as_json: bool) -> None:
    """Find copies of MODEL, or among all models; what is found is recorded in the lineage."""
    from modelgrove_hub.verbs.lineage import plan_copies

    report = do_work(ask(plan_copies, model=model, confirm=confirm), **at_once()).outputs["report"]
    if as_json:
        print_json(report)
        return
    for pair in report["pairs"]:
        click.echo(pair["text"])
    say(f"{len(report['pairs'])} pairs among {report['models']} models")
