"""`modelgrove mark`, `verify` and `attack`: put a key's mark into weights, look for it, and try to take it away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from modelgrove_hub.cli.method import MethodCommand, chosen_plugin, given
from modelgrove_hub.cli.output import json_option, say
from modelgrove_hub.cli.place import ask
from modelgrove_hub.cli.work import do, place_options, show_job


@click.command(cls=MethodCommand, kind="editor", default="weight-mark")
@click.argument("model")
@click.option("--key", required=True, metavar="NAME", help="Of a key that `modelgrove key new` made.")
@click.option("--name", help="Name of the new model; default: made from MODEL.")
@place_options
@json_option
def mark(
    model: str, method: str, key: str, name: str | None, wait: bool, local: bool, as_json: bool, **values: Any
) -> None:
    """Write a copy of MODEL that holds the mark of a key."""
    params = given(chosen_plugin("editor", method).Params, values) | {"key": _commitment(key)}
    inputs = [model]
    job = do(f"editor.{method}", params, inputs, target=name, wait=wait, local=local)
    if not as_json and job.finished_at is not None:
        _tell_mark(job.outputs.get("report", {}))
    show_job(job, as_json=as_json)


@click.command(cls=MethodCommand, kind="verifier", default="weight-mark")
@click.argument("model")
@click.option("--key", required=True, metavar="NAME", help="Of a key that `modelgrove key new` made.")
@click.option("--reference", metavar="MODEL", help="The unmarked original, for copies that were re-ordered or merged.")
@place_options
@json_option
def verify(
    model: str, method: str, key: str, reference: str | None, wait: bool, local: bool, as_json: bool, **values: Any
) -> None:
    """Look for the mark of a key in MODEL: an exact test. Finding nothing is no evidence that nothing is there."""
    params = given(chosen_plugin("verifier", method).Params, values) | {"key": _commitment(key)}
    params |= {"reference": True} if reference else {}
    inputs = [model, *([reference] if reference else [])]
    job = do(f"verifier.{method}", params, inputs, wait=wait, local=local)
    if not as_json and job.finished_at is not None:
        _tell_verdict(job.outputs.get("report", {}))
    else:
        show_job(job, as_json=as_json)


@click.command(cls=MethodCommand, kind="editor", default="attack", only=True)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--key", metavar="NAME", help="overwrite: the key of the second mark.")
@click.option("--name", help="Name of the new model; default: made from the first MODEL.")
@place_options
@json_option
def attack(
    models: tuple[str, ...], key: str | None, name: str | None, wait: bool, local: bool, as_json: bool, **values: Any
) -> None:
    """Write a copy of MODEL whose weights were attacked, to see which marks survive it."""
    params = given(chosen_plugin("editor", "attack").Params, values)
    params |= {"key": _commitment(key)} if key else {}
    job = do("editor.attack", params, models, target=name, wait=wait, local=local)
    if not as_json and job.finished_at is not None:
        report = job.outputs.get("report", {})
        say(f"{report.get('attack')}: the weights moved by {report.get('change', 0):.2%} of their norm")
    show_job(job, as_json=as_json)


def _commitment(name: str) -> str:
    from modelgrove_hub.verbs.keys import show_key

    return ask(show_key, key=name).id


def _tell_mark(report: Mapping[str, Any]) -> None:
    """What was changed, and what is read back, as far as the method reports it."""
    if "relative" in report.get("change", {}):
        say(f"{report['change']['matrices']} matrices changed by {report['change']['relative']:.2%} of their norm")
    for name, read in report.get("read_back", {}).items():
        say(f"{name}: {_bits(read)}, weakest bit at {read['weakest_bit']:.1f} σ")
    fidelity = report.get("fidelity", {})
    if "error" in fidelity:
        say(f"error of the denoiser's output: {fidelity['error']:.2g} of its energy")


def _tell_verdict(report: Mapping[str, Any]) -> None:
    click.echo(report.get("decision", "no decision was reported"))
    if "reading" in report:
        read = report["reading"]
        sign = " (inverted)" if read["inverted"] and report["decision"] == "verified" else ""
        say(
            f"{_bits(read)}{sign}: p = 10^{read['log10_p']:.1f}, "
            f"over {report['hypotheses']:.3g} hypotheses 10^{report['log10_corrected_p']:.1f}"
        )
    if "claim" in report:
        say(f"claim: {report['claim']}")


def _bits(read: Mapping[str, Any]) -> str:
    return f"{read['agreeing']} of {read['bits']} bits agree"
