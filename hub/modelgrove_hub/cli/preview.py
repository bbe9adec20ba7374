"""`modelgrove preview`: pictures by a model, with adapters, as one PNG."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelgrove_hub.cli.method import MethodCommand, given
from modelgrove_hub.cli.output import json_option, print_json, say
from modelgrove_hub.cli.work import do, open_hub, show_job, work_options
from modelgrove_hub.errors import PluginError, UsageError

if TYPE_CHECKING:
    from modelgrove_hub.hub import Hub
    from modelgrove_hub.tables import Job, Revision

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
    from modelgrove_hub.plugins import check_params, get_plugin

    plugin, hub = get_plugin(f"previewer.{method}"), open_hub()
    revisions, weights = _chosen(hub, model, [_lora(text) for text in lora_weights])
    chosen = {**given(plugin.Params, values), **({"lora_weights": weights} if weights else {})}
    params = check_params(plugin, chosen).model_dump(mode="json")
    name = previews.preview_key(f"previewer.{method}", params, [revision.digest for revision in revisions])
    picture, job = previews.get(hub.settings, name), None
    if picture is None:
        ids = [revision.id for revision in revisions if revision.id is not None]
        key = key or previews.job_key(name, ids)
        job = do(hub, f"previewer.{method}", params, ids, wait=wait or out is not None, local=local, key=key)
        if job.finished_at is None:
            show_job(job, as_json=as_json)
            return
        picture = previews.put(hub.settings, name, _artefact(hub, job))
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


def _chosen(hub: Hub, model: str, loras: list[tuple[str, float]]) -> tuple[list[Revision], list[float]]:
    """The base and the adapters to load, and the adapters' weights. An adapter as MODEL brings its base."""
    from modelgrove_hub.previews import find_base
    from modelgrove_hub.registry.models import find, find_revision
    from modelgrove_hub.tables import ModelKind

    with hub.reading() as session:
        row = find(session, model)
        if row.kind == ModelKind.ADAPTER:
            base, loras = find_base(session, row), [(model, 1.0), *loras]
        else:
            base = find_revision(session, model)
        return [base, *(find_revision(session, ref) for ref, _ in loras)], [weight for _, weight in loras]


def _artefact(hub: Hub, job: Job) -> Path:
    sha256 = job.outputs.get("artefacts", {}).get(_PICTURE)
    if sha256 is None:
        raise PluginError(f"job {job.id} ({job.plugin}) left no {_PICTURE}")
    return hub.store.path(sha256)


def _tell(picture: Path, job: Job | None, as_json: bool) -> None:
    adapters = job.outputs.get("report", {}).get("adapters", []) if job else []
    if as_json:
        print_json(
            {"picture": str(picture), "cached": job is None, "job": job.id if job else None, "adapters": adapters}
        )
        return
    for adapter in adapters:
        say(f"{adapter['adapter']}: {adapter['matched']} of {adapter['modules']} modules matched")
    click.echo(picture)
