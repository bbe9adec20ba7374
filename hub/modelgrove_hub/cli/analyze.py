"""`modelgrove analyze`: a report about a model, by any installed analyzer."""

from __future__ import annotations

from typing import Any

import click

from modelgrove_hub.cli.method import MethodCommand, chosen_plugin, given
from modelgrove_hub.cli.output import json_option, print_json
from modelgrove_hub.cli.work import do, show_job, work_options


@click.command(cls=MethodCommand, kind="analyzer", default="copies")
@click.argument("models", nargs=-1, required=True)
@work_options
@json_option
def analyze(
    models: tuple[str, ...], method: str, wait: bool, local: bool, key: str | None, as_json: bool, **values: Any
) -> None:
    """Report on MODELS; the report is JSON and stays with the job."""
    plugin = chosen_plugin("analyzer", method)
    params = given(plugin.Params, values)
    job = do(f"analyzer.{method}", params, models, wait=wait, local=local, key=key)
    if job.finished_at and not as_json:
        print_json(job.outputs.get("report", {}))
    else:
        show_job(job, as_json=as_json)
