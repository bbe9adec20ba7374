"""`modelgrove expert`: fit encoders of weights, and place models with them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from modelgrove_hub.cli.method import MethodCommand, chosen_plugin, given
from modelgrove_hub.cli.output import json_option, print_json, print_table, say
from modelgrove_hub.cli.place import ask
from modelgrove_hub.cli.work import do_work, show_job, work_options

if TYPE_CHECKING:
    from modelgrove_hub.search.embedding import Embedded


@click.group()
def expert() -> None:
    """Experts learn what the weights of one model tree do; `search` needs one a tree."""


@expert.command(cls=MethodCommand, kind="embedder", default="gram-ridge")
@click.option("--tree", required=True, help="As `modelgrove expert ls` shows it: mostly the family of the base model.")
@click.option(
    "--kind",
    type=click.Choice(["adapter", "checkpoint"]),
    help="Learn from adapters or from whole networks; when left out, from the kind of which more are documented.",
)
@work_options
@json_option
def fit(
    tree: str, kind: str | None, method: str, wait: bool, local: bool, key: str | None, as_json: bool, **values: Any
) -> None:
    """Fit an expert on the documented models of TREE, then place all its models with it."""
    from modelgrove_hub.verbs.experts import Fit, plan_fit
    from modelgrove_hub.verbs.experts import embed as place_all

    params = given(chosen_plugin("embedder", method).Params, values)
    plan = ask(plan_fit, fit=Fit(tree=tree, kind=kind, method=method, params=params, key=key))
    job = do_work(plan, wait=wait, local=local)
    if job.finished_at is None:
        show_job(job, as_json=as_json)
        say("When it is done: modelgrove expert embed")
        return
    done = ask(place_all, tree=tree)
    if as_json:
        print_json({**job.model_dump(), "embedded": asdict(done)})
        return
    for name, value in job.outputs["report"].get("metrics", {}).items():
        click.echo(f"{name}: {value}")
    _tell(done)


@expert.command()
@click.option("--tree", help="Only this tree.")
@json_option
def embed(tree: str | None, as_json: bool) -> None:
    """Place all models that have no vector yet, by weights and by card."""
    from modelgrove_hub.verbs.experts import embed as place_all

    done = ask(place_all, tree=tree)
    if as_json:
        print_json(asdict(done))
    else:
        _tell(done)


@expert.command()
@click.option("--family", help="Only models of this family.")
@json_option
def route(family: str | None, as_json: bool) -> None:
    """Decide again which tree every model belongs to, from its weights."""
    from modelgrove_hub.verbs.experts import route as decide

    done = ask(decide, family=family)
    if as_json:
        print_json(asdict(done))
        return
    print_table(
        ("model", "tree before", "tree now"),
        ((name, move.before or "none", move.after or "none") for name, move in done.moved.items()),
        empty=f"{done.models} models looked at: all are in the trees that they were in.",
    )
    for name, reason in done.skipped.items():
        say(f"skipped {name}: {reason}")
    if done.moved:
        say("Next: modelgrove expert embed")


@expert.command("ls")
@json_option
def list_experts(as_json: bool) -> None:
    """List the trees, their newest experts and how many models wait for a vector."""
    from modelgrove_hub.verbs.experts import list_experts as verb

    found = ask(verb)
    rows = [group.model_dump() for group in found.groups]
    if as_json:
        print_json(rows)
        return
    print_table(
        ("tree", "kind", "models", "without vector", "expert", "made", "metrics"),
        (
            (row["tree"], row["kind"], row["models"], row["not_embedded"], row["expert"] or "none", row["created_at"],
             [f"{name} {value}" for name, value in row["metrics"].items()])
            for row in rows
        ),
        empty="No adapters here. Next: modelgrove ingest PATH",
    )  # fmt: skip
    for family, count in found.outside.items():
        say(f"{count} adapters of family {family} fit no known tree: `modelgrove show` says why.")


def _tell(done: Embedded) -> None:
    say(f"Placed {done.weights} models by weights and {done.cards} by card.")
    for name, reason in done.skipped.items():
        say(f"skipped {name}: {reason}")
