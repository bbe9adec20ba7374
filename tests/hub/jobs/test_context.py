"""What a plugin may do with its context, and what it may not."""

import time

import pytest

from modelgrove_hub.contracts import Cancelled, Context
from modelgrove_hub.errors import PluginError
from modelgrove_hub.jobs import rows
from modelgrove_hub.jobs.context import LOG_LIMIT, JobContext
from modelgrove_hub.jobs.lease import Lease


@pytest.fixture
def database_url(sqlite_url):
    """SQLite alone: what is tested here is not in the database."""
    return sqlite_url


@pytest.fixture
def job(hub, tmp_path):
    made = rows.submit(hub, "steady", {"counter": str(tmp_path)})
    with hub.transaction() as session:
        return rows.claim(session, made.id, "me", 60)


@pytest.fixture
def context(hub, job, tmp_path):
    return JobContext((), "key", tmp_path / "staging", Lease(hub, job.id, "me"))


@pytest.mark.parametrize("path", ["", ".", "..", "../x", "/etc/passwd", "a/../../x", "link/x"])
def test_no_path_leaves_the_output_folder(context, tmp_path, path):
    (context.out / "link").symlink_to(tmp_path)

    with pytest.raises(PluginError, match="not inside the output folder"):
        context.path(path)


def test_a_path_inside_has_its_folders_made(context):
    place = context.path("a/b/../c.txt")

    assert place.parent.is_dir()
    assert place.relative_to(context.out.resolve()).as_posix() == "a/c.txt"


def test_writers_are_closed_in_the_end_and_a_path_has_one(context):
    import torch
    from safetensors.torch import load_file

    with context:
        context.writer("a/one.safetensors", {"by": "me"}).add("x", torch.ones(2))
        context.writer("two.safetensors").add("x", torch.zeros(2))
        with pytest.raises(PluginError, match="has a writer already"):
            context.writer("a/../two.safetensors")
    assert load_file(context.out / "a/one.safetensors")["x"].tolist() == [1, 1]
    assert load_file(context.out / "two.safetensors")["x"].tolist() == [0, 0]


def test_a_failed_run_leaves_no_file_of_its_writers(context):
    import torch

    def fail():
        with context:
            context.writer("one.safetensors").add("x", torch.ones(2))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(context.out.rglob("*.safetensors")) == []


def test_numbers_are_the_jobs_own(context, hub, job, tmp_path):
    import torch

    again = JobContext((), "key", tmp_path / "again", Lease(hub, job.id, "me"))
    other = JobContext((), "another", tmp_path / "other", Lease(hub, job.id, "me"))
    drawn = [torch.rand(4, generator=each.generator()).tolist() for each in (context, again, other, context)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert drawn[0] != drawn[3], "a second draw goes on, it does not repeat the first"


def test_progress_is_clamped_and_written_a_few_times_a_second(context, hub, job):
    writes = []
    beat = context._lease.beat
    context._lease.beat = lambda *args, **report: (writes.append(report), beat(*args, **report))

    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        context.progress(7, "over\nthe top")
    context.progress(float("nan"))
    # One write at once, then one each 0.2 s: not the thousands of calls.
    assert 1 <= len(writes) <= 4
    assert writes[0] == {"progress": 1.0, "message": "over the top"}
    context.flush()
    assert rows.get(hub, job.id).progress == 0.0


def test_log_lines_reach_the_row_in_order_and_are_bounded(context, hub, job):
    with context:
        context.log("first")
        context.log("second")
        for _ in range(100):
            context.log("x" * (LOG_LIMIT // 50))
    log = rows.get(hub, job.id).log
    assert [line[9:] for line in log.splitlines()[:2]] == ["first", "second"]
    assert len(log) < LOG_LIMIT * 1.1
    assert log.splitlines()[-1].startswith("the log is full")


def test_a_cancel_reaches_the_plugin_at_its_next_step(context, hub, job):
    rows.cancel(hub, job.id)

    with pytest.raises(Cancelled):
        context.progress(0.5)


def test_the_context_is_what_the_contract_promises(context):
    promised = {name for name in vars(Context) if not name.startswith("_")} | set(Context.__annotations__)

    assert promised <= set(dir(context))
