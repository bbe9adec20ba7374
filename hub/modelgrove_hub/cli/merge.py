"""`modelgrove merge`: join adapters into one, by any installed merger."""

from __future__ import annotations

from typing import Any

import click

from modelgrove_hub.cli.method import MethodCommand, chosen_plugin, given
from modelgrove_hub.cli.output import json_option
from modelgrove_hub.cli.work import do, open_hub, resolve, show_job, work_options


@click.command(cls=MethodCommand, kind="merger", default="sum")
@click.argument("models", nargs=-1, required=True)
@click.option("--name", help="Name of the new model; default: made from the first MODEL.")
@work_options
@json_option
def merge(
    models: tuple[str, ...], method: str, name: str | None, wait: bool, local: bool, key: str | None, as_json: bool,
    **values: Any,
) -> None:  # fmt: skip
    """Join MODELS into one new model; the report says how much they interfere."""
    plugin = chosen_plugin("merger", method)
    hub = open_hub()
    params = given(plugin.Params, values)
    inputs = resolve(hub, models)
    job = do(hub, f"merger.{method}", params, inputs, target=name, wait=wait, local=local, key=key)
    show_job(job, as_json=as_json)
