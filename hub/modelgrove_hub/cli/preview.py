"""`modelgrove preview`: pictures by a model, with adapters, as one PNG."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from modelgrove_hub.cli.method import MethodCommand, chosen_plugin, given
from modelgrove_hub.cli.output import json_option, print_json, say
from modelgrove_hub.cli.place import ask, copy_artefact, hub_url
from modelgrove_hub.cli.work import do_work, show_job, work_options
from modelgrove_hub.errors import UsageError

if TYPE_CHECKING:
    from modelgrove_hub.verbs.facts import JobFacts

_PICTURE = "preview.png"


@click.command(cls=MethodCommand, kind="previewer", default="diffusers")
@click.argument("model")
@click.option("--prompt", "prompts", multiple=True, required=True, help="What to paint; each gets a row.")
@click.option("--lora", "lora_weights", multiple=True, metavar="REF[:WEIGHT]", help="Adapter to fuse in; repeatable.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Where to put the PNG (implies --wait).")
@work_options
@json_option
def preview(
    model: str, lora_weights: tuple[str, ...], method: str, out: Path | None, wait: bool, local: bool,
    key: str | None, as_json: bool, **values: Any,
) -> None:  # fmt: skip
    """Paint with MODEL: a row of pictures for each prompt. An adapter is shown on its base.

    The same preview is painted once; asked for again, the same picture comes from the cache.
    """
    from modelgrove_hub import previews
    from modelgrove_hub.settings import settings
    from modelgrove_hub.verbs.previews import Painting, Worn, plan_preview

    loras = [Worn(model=ref, weight=weight) for ref, weight in map(_lora, lora_weights)]
    params = given(chosen_plugin("previewer", method).Params, values)
    plan = ask(plan_preview, painting=Painting(model=model, params=params, loras=loras, method=method, key=key))
    picture, job = None if hub_url() else previews.get(settings(), plan.name), None
    if picture is None:
        job = do_work(plan.work, wait=wait or out is not None, local=local)
        if job.finished_at is None:
            show_job(job, as_json=as_json)
            return
        with TemporaryDirectory() as folder:
            painted = copy_artefact(job, _PICTURE, Path(folder) / _PICTURE)
            picture = previews.put(settings(), plan.name, painted)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        picture = Path(shutil.copyfile(picture, out))
    _tell(picture, job, as_json)


def _lora(text: str) -> tuple[str, float]:
    """ "owner/name:0.8" → its two parts; without a number the weight is 1."""
    ref, colon, weight = text.rpartition(":")
    if not colon:
        return text, 1.0
    try:
        return ref, float(weight)
    except ValueError as error:
        raise UsageError(f"--lora {text}: {weight!r} is no weight; write REF or REF:0.8") from error


def _tell(picture: Path, job: JobFacts | None, as_json: bool) -> None:
    adapters = job.outputs.get("report", {}).get("adapters", []) if job else []
    if as_json:
        print_json(
            {"picture": str(picture), "cached": job is None, "job": job.id if job else None, "adapters": adapters}
        )
        return
    for adapter in adapters:
        say(f"{adapter['adapter']}: {adapter['matched']} of {adapter['modules']} modules matched")
    click.echo(picture)
