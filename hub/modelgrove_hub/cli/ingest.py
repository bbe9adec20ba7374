"""`modelgrove ingest`: register the models in files and folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelgrove_hub.cli.output import dry_run_option, json_option, print_json, say
from modelgrove_hub.cli.place import hub_url
from modelgrove_hub.cli.work import open_hub
from modelgrove_hub.errors import DataError, UsageError

if TYPE_CHECKING:
    from modelgrove_hub.ingest.pipeline import Ingested

_MODES = click.Choice(["reference", "hardlink", "copy"])


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--mode",
    type=_MODES,
    default="reference",
    show_default=True,
    help="Leave files in place, or keep them in the store.",
)
@click.option(
    "--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes that hash and recognise."
)
@click.option(
    "--convert-pickles", is_flag=True, help="Make safetensors of plain pickles, read in a confined process (Linux)."
)
@dry_run_option
@json_option
def ingest(
    paths: tuple[Path, ...], mode: Any, workers: int, convert_pickles: bool, dry_run: bool, as_json: bool
) -> None:
    """Register every model under PATHS; running it again only reads what changed. With --hub they are uploaded."""
    from modelgrove_hub.formats.texts import one_line
    from modelgrove_hub.ingest.discover import discover

    if dry_run:
        found = [item for path in paths for item in discover(path)]
        if as_json:
            print_json(
                [
                    {"path": one_line(str(item.root)), "name": one_line(item.name), "files": len(item.files)}
                    for item in found
                ]
            )
        else:
            for model in found:
                click.echo(one_line(f"{model.name}  {model.root}"))
        return
    results = []
    for item in _ingested(paths, mode, workers, convert_pickles):
        results.append(item)
        if not as_json:
            click.echo(_line(item))
    counts = Counter(item.outcome for item in results)
    if as_json:
        print_json({"models": [asdict(item) for item in results], "counts": counts})
    rest = "".join(f", {counts[what]} {what}" for what in ("converted", "unconverted") if counts[what])
    say(f"{counts['new']} new, {counts['known']} known, {counts['refused']} refused{rest}")
    if results and counts["refused"] == len(results):
        raise DataError(f"nothing could be registered: all {len(results)} models were refused")


def _ingested(paths: tuple[Path, ...], mode: Any, workers: int, convert_pickles: bool) -> Iterator[Ingested]:
    """What becomes of each model: registered here, or uploaded to the hub that was named."""
    from modelgrove_hub.ingest.pipeline import ingest as run

    if not hub_url():
        hub = open_hub()
        yield from run(hub, paths, mode, workers, convert_pickles=convert_pickles or hub.settings.convert_pickles)
        return
    from modelgrove_hub.cli.upload import upload

    if convert_pickles:
        raise UsageError("--convert-pickles works where the models are registered: set it where the hub is")
    yield from upload(paths)


def _line(item: Ingested) -> str:
    if item.outcome in ("refused", "unconverted"):
        reason = item.reason if item.path in item.reason else f"{item.path}: {item.reason}"
        return f"{item.outcome}  {reason}"
    doubt = "" if item.trust == "ok" else item.trust
    broken = f"({item.not_finite} tensors hold NaN or infinite values)" if item.not_finite else ""
    facts = " ".join(fact for fact in (item.kind, item.adapter_type, item.family, doubt, broken) if fact)
    return f"{item.outcome:7}  {item.name}  {facts}"
