"""`modelgrove diff`: what changed from one model to another, in plain words and layer by layer."""

from __future__ import annotations

from typing import Any

import click

from modelgrove_hub.cli.output import json_option, print_json, print_table
from modelgrove_hub.cli.work import at_once, do

_SHOWN = 12


@click.command()
@click.argument("before")
@click.argument("after")
@click.option("--ranks/--no-ranks", default=True, show_default=True, help="Count the rank of each layer's change.")
@click.option("--all", "show_all", is_flag=True, help="Show every changed layer, not just the most changed.")
@json_option
def diff(before: str, after: str, ranks: bool, show_all: bool, as_json: bool) -> None:
    """Say what became of model BEFORE in model AFTER: two checkpoints, or two adapters."""
    job = do("analyzer.diff", {"ranks": ranks}, [before, after], **at_once())
    report = job.outputs["report"]
    if as_json:
        print_json(report)
        return
    click.echo(report["summary"])
    layers = report["layers"] if show_all else report["layers"][:_SHOWN]
    if layers:
        click.echo()
        headers = ("layer", "shape", "change", "cosine", "rank")
        print_table(headers, (_row(layer) for layer in layers), empty="")
    hidden = len(report["layers"]) - len(layers) + report["left_out"]
    if hidden:
        click.echo(f"… and {hidden} more; see them all with --all")


def _row(layer: dict[str, Any]) -> tuple[object, ...]:
    rank = layer["rank"]
    shown = "" if rank is None else f"≥ {rank}" if layer.get("at_least") else rank
    return (
        layer["name"],
        "×".join(map(str, layer["shape"])),
        f"{layer['relative']:.2%}",
        f"{layer['cosine']:.4f}",
        shown,
    )
