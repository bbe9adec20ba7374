"""`modelgrove expert`: fit encoders of weights, and place models with them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from modelgrove_hub.cli.method import MethodCommand, chosen_plugin, given
from modelgrove_hub.cli.output import json_option, print_json, print_table, progress_bar, say
from modelgrove_hub.cli.work import do, open_hub, show_job, work_options

if TYPE_CHECKING:
    from modelgrove_hub.hub import Hub
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
    from modelgrove_hub.registry.routing import route as look_at
    from modelgrove_hub.search.embedding import embed_missing
    from modelgrove_hub.search.experts import training_inputs

    plugin = chosen_plugin("embedder", method)
    hub = open_hub()
    look_at(hub)  # an expert must not learn from the models of two trees
    with hub.reading() as session:
        inputs = training_inputs(session, tree, kind)
    params = given(plugin.Params, values)
    job = do(hub, f"embedder.{method}", params, inputs, target=tree, wait=wait, local=local, key=key)
    if job.finished_at is None:
        show_job(job, as_json=as_json)
        say("When it is done: modelgrove expert embed")
        return
    done = embed_missing(hub, tree)
    if as_json:
        print_json({**job.model_dump(exclude={"log"}), "embedded": asdict(done)})
        return
    for name, value in job.outputs["report"].get("metrics", {}).items():
        click.echo(f"{name}: {value}")
    _tell(done)


@expert.command()
@click.option("--tree", help="Only this tree.")
@json_option
def embed(tree: str | None, as_json: bool) -> None:
    """Place all models that have no vector yet, by weights and by card."""
    from modelgrove_hub.search.embedding import embed_missing

    hub = open_hub()
    update, close = progress_bar("embed")
    try:
        done = embed_missing(hub, tree, update)
    finally:
        close()
    if as_json:
        print_json(asdict(done))
    else:
        _tell(done)


@expert.command()
@click.option("--family", help="Only models of this family.")
@json_option
def route(family: str | None, as_json: bool) -> None:
    """Decide again which tree every model belongs to, from its weights."""
    from modelgrove_hub.registry.routing import route as decide

    hub = open_hub()
    update, close = progress_bar("route")
    try:
        done = decide(hub, family, again=True, progress=update)
    finally:
        close()
    if as_json:
        print_json(asdict(done))
        return
    print_table(
        ("model", "tree before", "tree now"),
        ((name, before or "none", after or "none") for name, (before, after) in done.moved.items()),
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
    from modelgrove_hub.search.groups import fits_none

    hub = open_hub()
    rows = _groups(hub)
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
    with hub.reading() as session:
        for family, count in fits_none(session).items():
            say(f"{count} adapters of family {family} fit no known tree: `modelgrove show` says why.")


def _groups(hub: Hub) -> list[dict[str, Any]]:
    from modelgrove_hub.search.embedding import not_embedded
    from modelgrove_hub.search.experts import newest_experts
    from modelgrove_hub.search.groups import groups

    with hub.reading() as session:
        counts, experts, missing = groups(session), newest_experts(session), not_embedded(session)
    return [
        {
            "tree": group.tree,
            "kind": group.kind,
            "models": counts.get(group, 0),
            "not_embedded": missing.get(group, 0),
            "expert": f"{found.encoder} v{found.version}" if found else None,
            "created_at": found.created_at if found else None,
            "metrics": found.metrics if found else {},
            "calibration": {name: it for name, it in found.calibration.items() if name != "centre"} if found else {},
        }
        for group in sorted({*counts, *experts})
        for found in (experts.get(group),)
    ]


def _tell(done: Embedded) -> None:
    say(f"Placed {done.weights} models by weights and {done.cards} by card.")
    for name, reason in done.skipped.items():
        say(f"skipped {name}: {reason}")
