"""`modelgrove sheet`: PNG files side by side under their titles."""

from __future__ import annotations

from pathlib import Path

import click

from modelgrove_hub.cli.output import json_option, print_json
from modelgrove_hub.errors import UsageError


@click.command()
@click.option("--column", "columns", multiple=True, required=True, metavar="TITLE=FILE", help="A picture; repeatable.")
@click.option("--row", "rows", multiple=True, help="Label of an equal band of the pictures, from the top; repeatable.")
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="Where to put the PNG.")
@json_option
def sheet(columns: tuple[str, ...], rows: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Compare previews: join PNG files side by side, with titles and row labels."""
    from modelgrove_plugins.preview.sheet import compose

    picture = compose([_column(text) for text in columns], rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out, "PNG")
    if as_json:
        print_json({"picture": str(out), "width": picture.width, "height": picture.height})
    else:
        click.echo(out)


def _column(text: str) -> tuple[str, Path]:
    title, equals, file = text.rpartition("=")
    if not equals or not Path(file).is_file():
        raise UsageError(f"--column {text}: write TITLE=FILE, with the path of a PNG")
    return title, Path(file)
