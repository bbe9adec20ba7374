"""`modelgrove merge` and `modelgrove recipe`: join models into one by any installed merger, and say how it was done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from modelgrove_hub.cli.method import MethodCommand, chosen_plugin, given
from modelgrove_hub.cli.output import json_option, print_json, print_table, say
from modelgrove_hub.cli.place import ask
from modelgrove_hub.cli.work import do, show_job, work_options
from modelgrove_hub.errors import UsageError


@click.command(cls=MethodCommand, kind="merger", default="orthogonal")
@click.argument("models", nargs=-1, metavar="MODEL[:WEIGHT]...")
@click.option(
    "--base", metavar="MODEL", help="Bake adapters into a copy of this checkpoint; what checkpoints grew from."
)
@click.option("--plan", is_flag=True, help="Only report how much the adapters interfere; nothing is written.")
@click.option(
    "--recipe",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Follow a YAML file, ours or mergekit's.",
)
@click.option("--name", help="Name of the new model; default: made from the first MODEL.")
@work_options
@json_option
def merge(
    models: tuple[str, ...], method: str, base: str | None, plan: bool, recipe: Path | None, name: str | None,
    wait: bool, local: bool, key: str | None, as_json: bool, **values: Any,
) -> None:  # fmt: skip
    """Join MODELs into one new model; the report says how much they interfere."""
    if recipe is not None:
        if models or base or plan:
            raise UsageError("a recipe says what is merged: give it alone")
        method, params, inputs = _followed(recipe)
    else:
        names, weights = _weighted(models)
        if weights and values.get("weights"):
            raise UsageError("weights are given either as MODEL:WEIGHT or by --weights, not both")
        inputs = [*names, *([base] if base else [])]
        if plan:
            wanted = {"weights": weights or list(values.get("weights") or ()), "base": base is not None}
            _plan(inputs, wanted, wait=wait, local=local, key=key, as_json=as_json)
            return
        params = given(chosen_plugin("merger", method).Params, values)
        params |= {"weights": weights} if weights else {}
        params |= {"base": True} if base else {}
    job = do(f"merger.{method}", params, inputs, target=name, wait=wait, local=local, key=key)
    if not as_json and job.finished_at is not None:
        _tell(job.outputs.get("report", {}))
    show_job(job, as_json=as_json)


@click.command()
@click.argument("model")
@json_option
def recipe(model: str, as_json: bool) -> None:
    """Show how MODEL was merged, as `modelgrove merge --recipe` reads it."""
    from modelgrove_hub.verbs.models import show_recipe

    found = ask(show_recipe, model=model)
    if as_json:
        print_json(found.model_dump(mode="json", exclude_none=True))
    else:
        click.echo(found.to_yaml(), nl=False)


def _weighted(models: Sequence[str]) -> tuple[list[str], list[float]]:
    """Names, and the weights behind their last colons; no weights if there is none."""
    names, weights, some = [], [], False
    for text in models:
        head, _, tail = text.rpartition(":")
        try:
            weight: float | None = float(tail) if head else None
        except ValueError:
            weight = None
        some = some or weight is not None
        names.append(text if weight is None else head)
        weights.append(1.0 if weight is None else weight)
    if not names:
        raise UsageError("there is nothing to merge: name one model or more, or give a --recipe")
    return names, weights if some else []


def _followed(path: Path) -> tuple[str, dict[str, Any], list[str]]:
    from modelgrove_hub.recipes import read_recipe

    recipe = read_recipe(path)
    return recipe.method, recipe.params(), recipe.inputs()


def _plan(
    inputs: Sequence[str], params: Mapping[str, Any], *, wait: bool, local: bool, key: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    job = do("analyzer.crosstalk", params, inputs, wait=wait, local=local, key=key)
    if not as_json and job.finished_at is not None:
        _tell(job.outputs["report"])
        _show_pairs(job.outputs["report"])
    else:
        show_job(job, as_json=as_json)


def _tell(report: Mapping[str, Any]) -> None:
    """What a person wants to know at once, as far as the method reports it: strangers' plugins need not."""
    for row in report.get("coverage", ()):
        if "in_base" in row:
            say(f"{row['adapter']}: {row['in_base']} of {row['modules']} modules matched{_unmatched(row)}")
        elif row.get("unmatched_names"):
            say(f"{row['adapter']}: {row['modules']} modules{_unmatched(row)}")
    for note in report.get("notes", ()):
        say(note)
    for warning in report.get("warnings", ()):
        say(f"warning: {warning}")


def _show_pairs(report: Mapping[str, Any]) -> None:
    asked = any("damage_of_b_on_a" in pair for pair in report["pairs"])
    measure = "damage" if asked else "crosstalk"
    rows = [
        [pair["a"], pair["b"], f"{pair[f'{measure}_of_b_on_a']:.2f}", f"{pair[f'{measure}_of_a_on_b']:.2f}",
         f"{pair['cosine']:+.2f}", pair["shared_modules"], pair["verdict"]]
        for pair in report["pairs"]
    ]  # fmt: skip
    headers = ["a", "b", "b on a", "a on b", "cosine", "shared", "verdict"]
    print_table(headers, rows, empty="One adapter alone has nothing to interfere with.")
    say(f"{measure}, {'measured on' if asked else 'from weights; the base was not asked:'} {report['asked']}")
    say(f"suggestion: {report['suggestion']['text']}")


def _unmatched(row: Mapping[str, Any]) -> str:
    names = [*row["unmatched_names"], *row.get("not_in_base", ())]
    return f"; unmatched: {', '.join(names)}" if names else ""
