"""`modelgrove rm`: forget a model."""

from __future__ import annotations

import click

from modelgrove_hub.cli.output import dry_run_option, json_option, print_json, say
from modelgrove_hub.cli.place import ask


@click.command()
@click.argument("models", nargs=-1, required=True)
@dry_run_option
@json_option
def rm(models: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Forget MODELS. Referenced files stay where they are; stored blobs go at the next `gc`."""
    from modelgrove_hub.verbs.models import Choice, remove_models

    names = ask(remove_models, choice=Choice(models=list(models), dry_run=dry_run)).names
    if as_json:
        print_json({"removed": [] if dry_run else names, "would_remove": names if dry_run else []})
    else:
        say(f"{'Would forget' if dry_run else 'Forgot'} {', '.join(names)}")
