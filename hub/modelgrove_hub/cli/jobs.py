"""`modelgrove jobs`: what the workers do, did and will do."""

from __future__ import annotations

from pathlib import Path

import click

from modelgrove_hub.cli.output import json_option, print_facts, print_json, print_table, say
from modelgrove_hub.cli.place import ask, copy_artefacts
from modelgrove_hub.cli.work import follow, show_job


@click.group()
def jobs() -> None:
    """List, watch, cancel and retry jobs."""


@jobs.command("ls")
@click.option("--state", type=click.Choice(["queued", "running", "done", "failed", "cancelled"]))
@click.option("--limit", type=click.IntRange(1, 10000), default=30, show_default=True)
@json_option
def list_(state: str | None, limit: int, as_json: bool) -> None:
    """List jobs, newest first."""
    from modelgrove_hub.verbs.jobs import list_jobs

    rows = ask(list_jobs, state=state, limit=limit).items
    if as_json:
        print_json([row.model_dump() for row in rows])
        return
    print_table(
        ("id", "plugin", "state", "done", "tries", "since", "message"),
        ((r.id, r.plugin, r.state, f"{r.progress:.0%}", r.attempts, r.created_at, r.error or r.message) for r in rows),
        empty="No jobs. Make one: modelgrove compress MODEL",
    )


@jobs.command()
@click.argument("job")
@json_option
def show(job: str, as_json: bool) -> None:
    """Show one job: parameters, result, log."""
    from modelgrove_hub.verbs.jobs import show_job as verb

    row = ask(verb, job=job)
    if as_json:
        print_json(row.model_dump())
        return
    shown = (
        "id",
        "plugin",
        "params",
        "state",
        "attempts",
        "progress",
        "message",
        "outputs",
        "error",
        "created_at",
        "finished_at",
    )
    print_facts((name, getattr(row, name)) for name in shown)
    if row.log:
        click.echo(f"\n{row.log}")


@jobs.command()
@click.argument("job")
@json_option
def wait(job: str, as_json: bool) -> None:
    """Show JOB's progress until it ends."""
    show_job(follow(job), as_json=as_json)


@jobs.command()
@click.argument("job")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@json_option
def files(job: str, folder: Path, as_json: bool) -> None:
    """Copy the plots and pictures that JOB left into FOLDER."""
    from modelgrove_hub.verbs.jobs import show_job as verb

    copied = copy_artefacts(ask(verb, job=job), folder)
    if as_json:
        print_json({name: str(place) for name, place in copied.items()})
        return
    for place in copied.values():
        click.echo(place)
    if not copied:
        say("It left no files.")


@jobs.command()
@click.argument("job")
@json_option
def cancel(job: str, as_json: bool) -> None:
    """Ask JOB to stop; a running one stops at its next step."""
    from modelgrove_hub.verbs.jobs import cancel_job

    row = ask(cancel_job, job=job)
    if as_json:
        print_json({"id": row.id, "state": row.state, "cancel_requested": row.cancel_requested})
    else:
        say(f"Job {row.id}: {row.state if row.finished_at else 'asked to stop'}")


@jobs.command()
@click.argument("job")
@json_option
def retry(job: str, as_json: bool) -> None:
    """Queue a failed or cancelled JOB again."""
    from modelgrove_hub.verbs.jobs import retry_job

    show_job(ask(retry_job, job=job), as_json=as_json)
