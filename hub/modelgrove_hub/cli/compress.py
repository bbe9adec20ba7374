"""`modelgrove compress`: a smaller copy of a model, by any installed compressor."""

from __future__ import annotations

from typing import Any

import click

from modelgrove_hub.cli.method import MethodCommand, chosen_plugin, given
from modelgrove_hub.cli.output import human_size, json_option, say
from modelgrove_hub.cli.work import do, open_hub, resolve, show_job, work_options


@click.command(cls=MethodCommand, kind="compressor", default="rtn")
@click.argument("model")
@click.option("--name", help="Name of the new model; default: MODEL-METHOD.")
@work_options
@json_option
def compress(
    model: str, method: str, name: str | None, wait: bool, local: bool, key: str | None, as_json: bool, **values: Any
) -> None:
    """Write a smaller copy of MODEL: a new model, with its lineage and what was lost."""
    plugin = chosen_plugin("compressor", method)
    hub = open_hub()
    params = given(plugin.Params, values)
    job = do(hub, f"compressor.{method}", params, resolve(hub, [model]), target=name, wait=wait, local=local, key=key)
    report = job.outputs.get("report", {})
    if not as_json and "bytes_before" in report:
        before, after = report["bytes_before"], report["bytes_after"]
        say(f"{human_size(before)} → {human_size(after)} ({after / before:.0%})")
    show_job(job, as_json=as_json)
