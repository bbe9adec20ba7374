"""Give work to the hub from the command line: submit, watch, or run it here."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any, TypeVar

import click

from modelgrove_hub.cli.output import print_json, progress_bar, say
from modelgrove_hub.errors import JobFailedError

if TYPE_CHECKING:
    from modelgrove_hub.hub import Hub
    from modelgrove_hub.tables import Job
    from modelgrove_hub.verbs.facts import JobFacts

Command = TypeVar("Command", bound=Callable[..., Any])

_POLL = 0.2
_HINT_AFTER = 5.0


def work_options(command: Command) -> Command:
    """`--wait`, `--local` and `--key`, as every command that makes a job has them."""
    command = click.option("--key", default=None, help="Idempotency key: the same key gives the same job.")(command)
    return place_options(command)


def place_options(command: Command) -> Command:
    """`--wait` and `--local` alone, for commands whose `--key` is a mark's."""
    command = click.option("--local", is_flag=True, help="Run it here and now, without a worker.")(command)
    return click.option("--wait", is_flag=True, help="Wait for the worker and show its progress.")(command)


def open_hub() -> Hub:
    """The hub of the settings, with its schema checked."""
    from modelgrove_hub.hub import Hub
    from modelgrove_hub.registry.schema import require_current

    hub = Hub.open()
    click.get_current_context().call_on_close(hub.engine.dispose)
    require_current(hub.engine)
    return hub


def resolve(hub: Hub, references: Sequence[str]) -> list[int]:
    """Revision ids of model references.

    Raises:
        NotFoundError: a reference names nothing.
    """
    from modelgrove_hub.registry.models import find_revision

    with hub.reading() as session:
        return [
            revision.id for revision in (find_revision(session, ref) for ref in references) if revision.id is not None
        ]


def do(
    hub: Hub, plugin: str, params: Mapping[str, Any], inputs: Sequence[int], *,
    target: str | None = None, wait: bool = False, local: bool = False, key: str | None = None,
) -> Job | JobFacts:  # fmt: skip
    """Submit a job and, as the user asked, run it here, wait for it or leave it to the workers.

    Raises:
        JobFailedError: the job was run or waited for, and failed.
    """
    from modelgrove_hub.jobs.dispatch import publish
    from modelgrove_hub.jobs.rows import submit
    from modelgrove_hub.jobs.run import run_local

    job = submit(hub, plugin, dict(params), list(inputs), target=target, key=key)
    if local:
        update, close = progress_bar(plugin)
        try:
            # Libraries print to stdout (huggingface_hub does, on a race of its imports); our data must stay clean.
            with redirect_stdout(sys.stderr):
                return _checked(run_local(hub, job.id, on_progress=update))
        finally:
            close()
    publish(hub, job)
    return follow(job.id) if wait else job


def follow(job_id: str) -> JobFacts:
    """Show a job's progress until it ends. Ctrl-C leaves the job running."""
    from modelgrove_hub.cli.place import ask
    from modelgrove_hub.verbs.jobs import show_job as get

    update, close = progress_bar(f"job {job_id[:8]}")
    started, hinted = time.monotonic(), False
    try:
        while not (job := ask(get, job=job_id)).finished_at:
            update(job.progress, job.message)
            if not hinted and not job.attempts and time.monotonic() - started > _HINT_AFTER:
                hinted = True
                say("No worker has taken the job yet: start one with `modelgrove worker`, or run again with --local.")
            time.sleep(_POLL)
    except KeyboardInterrupt:
        say(f"The job goes on. Watch it again: modelgrove jobs wait {job_id}")
        raise
    finally:
        close()
    return _checked(job)


def show_job(job: Job | JobFacts, *, as_json: bool) -> None:
    """Print a job as the end of a command."""
    if as_json:
        print_json(job.model_dump(exclude={"log"}))
    elif job.finished_at is None:
        say(f"Job {job.id} is {job.state}. Watch it: modelgrove jobs wait {job.id}")
        click.echo(job.id)
    else:
        for name in job.outputs.get("models", []):
            click.echo(name)


AnyJob = TypeVar("AnyJob", "Job", "JobFacts")


def _checked(job: AnyJob) -> AnyJob:
    if job.state != "done":
        raise JobFailedError(f"job {job.id} ({job.plugin}) {job.state}: {job.error or 'no reason was recorded'}")
    return job
