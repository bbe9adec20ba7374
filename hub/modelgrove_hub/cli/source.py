"""`modelgrove source`: places that the hub fills itself from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from modelgrove_hub.cli.output import json_option, print_facts, print_json, print_table, say
from modelgrove_hub.cli.place import ask, hub_url, only_here
from modelgrove_hub.cli.work import follow, open_hub
from modelgrove_hub.errors import JobFailedError, UsageError


@click.group()
def source() -> None:
    """Add, run and watch over sources of models."""


@source.command()
@click.argument("name")
@click.argument("url")
@click.option("--plugin", default="", help="Which source plugin.  [default: by the address]")
@click.option("--every", default="", metavar="6h", help="How long between two runs: a number and m, h or d.")
@click.option("--cron", default="", metavar="'0 3 * * * UTC'", help="When to run: five fields, and a time zone.")
@click.option(
    "--set", "options", multiple=True, metavar="NAME=VALUE", help="An option of the plugin, as in include=me/*,you/*."
)
@json_option
def add(name: str, url: str, plugin: str, every: str, cron: str, options: tuple[str, ...], as_json: bool) -> None:
    """Have models of URL taken in: a folder, hf://AUTHOR, s3://BUCKET/FOLDER, https://…"""
    from modelgrove_hub.verbs.sources import NewSource, add_source, create_source

    if every and cron:
        raise UsageError("say --every or --cron, not both")
    if "://" not in url and not hub_url():
        url = str(Path(url).absolute())
    wanted = NewSource(name=name, url=url, plugin=plugin, schedule=every or cron, params=_params(options))
    made = ask(add_source, source=wanted) if hub_url() else create_source(open_hub(), wanted, local=True)
    if as_json:
        print_json(made.model_dump())
        return
    when = "runs at once, then by its schedule" if made.schedule else f"runs by `modelgrove source run {name}`"
    say(f"Source {name} ({made.plugin}) {when}.")


@source.command("ls")
@json_option
def list_(as_json: bool) -> None:
    """List sources by name."""
    from modelgrove_hub.verbs.sources import list_sources

    rows = ask(list_sources)
    if as_json:
        print_json([row.model_dump() for row in rows])
        return
    print_table(
        ("name", "address", "schedule", "next", "last", "found"),
        (
            (
                row.name, row.url, "paused" if row.paused else row.schedule or "by hand", row.next_run,
                row.last.get("last_run", ""), _counts(row.last),
            )
            for row in rows
        ),
        empty="No sources. Add one: modelgrove source add NAME FOLDER --every 6h",
    )  # fmt: skip


@source.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show what NAME brought, what was refused and what is gone."""
    from modelgrove_hub.verbs.sources import show_source

    found = ask(show_source, name=name)
    if as_json:
        print_json(found.model_dump())
        return
    shown = ("name", "plugin", "url", "params", "schedule", "paused", "next_run", "models")
    print_facts([*((what, getattr(found, what)) for what in shown), ("last", _counts(found.last))])
    for refusal in found.refused:
        click.echo(f"refused  {refusal.key}: {refusal.reason}")
    for lost in found.gone:
        click.echo(f"gone     {lost.key} since {lost.gone_at:%Y-%m-%d %H:%M}")


@source.command()
@click.argument("name")
@click.option("--dry-run", is_flag=True, help="Say what would happen; register nothing.")
@click.option("--local", is_flag=True, help="Run here, without a worker.")
@click.option("--detach", is_flag=True, help="Do not wait for the end.")
@json_option
def run(name: str, dry_run: bool, local: bool, detach: bool, as_json: bool) -> None:
    """Run NAME now and tell what was new, changed, moved, gone or refused."""
    from modelgrove_hub.verbs.sources import Run, create_run, run_source

    wanted = Run(dry_run=dry_run, key=None)
    if local:
        from modelgrove_hub.jobs.run import run_local
        from modelgrove_hub.verbs.facts import JobFacts

        only_here("--local")
        hub = open_hub()
        job: Any = JobFacts.of(run_local(hub, create_run(hub, name, wanted).id))
    else:
        job = ask(run_source, name=name, run=wanted)
        job = job if detach else follow(job.id)
    if as_json:
        print_json({"id": job.id, "state": job.state, "error": job.error, "report": job.outputs.get("report", {})})
    elif job.state == "failed":
        raise JobFailedError(f"job {job.id} ({job.plugin}) failed: {job.error}")
    elif not job.outputs:
        say(f"Job {job.id} is {job.state}.")
    else:
        _tell(job.outputs["report"])


@source.command()
@click.argument("name")
def pause(name: str) -> None:
    """Start NAME no more by its schedule."""
    from modelgrove_hub.verbs.sources import pause_source

    ask(pause_source, name=name)
    say(f"Paused {name}.")


@source.command()
@click.argument("name")
def resume(name: str) -> None:
    """Start NAME by its schedule again."""
    from modelgrove_hub.verbs.sources import resume_source

    ask(resume_source, name=name)
    say(f"Resumed {name}.")


@source.command()
@click.argument("name")
def rm(name: str) -> None:
    """Forget the source NAME; the models that it brought stay."""
    from modelgrove_hub.verbs.sources import remove_source

    ask(remove_source, name=name)
    say(f"Removed {name}; its models stay.")


def _tell(report: dict[str, Any]) -> None:
    for outcome, models in report["models"].items():
        for item in models:
            click.echo(": ".join(filter(None, (f"{outcome:8} {item['model'] or item['key']}", item["reason"]))))
    say(_counts(report) or "nothing there")


def _counts(report: dict[str, Any]) -> str:
    return ", ".join(f"{number} {what}" for what, number in report.items() if type(number) is int)


def _params(options: tuple[str, ...]) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise UsageError(f"--set {option!r}: write NAME=VALUE")
        params[name.strip().replace("-", "_")] = value
    return params
