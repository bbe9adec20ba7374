"""`modelgrove events` shows the log and its head; `fsck` proves it, and tells a head that is gone."""

from __future__ import annotations

import click
import pytest
from sqlalchemy import text

from modelgrove_hub.cli.events import events
from modelgrove_hub.cli.fsck import fsck
from modelgrove_hub.errors import DataError
from modelgrove_hub.registry.events import START, record
from modelgrove_hub.store.fsck import check


@pytest.fixture
def logged(hub):
    """A hub with two events; their hashes."""
    with hub.transaction() as session:
        return [record(session, "registered", f"zoo/{name}").hash for name in ("apple", "pear")]


def test_an_empty_log_has_the_head_that_all_logs_start_with(hub, run) -> None:
    assert run(events) == []
    assert run(events, "--head", text=True) == [START]


def test_events_are_listed_newest_first(logged, run) -> None:
    assert [event["subject"] for event in run(events)] == ["zoo/pear", "zoo/apple"]
    assert [event["id"] for event in run(events, "--limit", "1")] == [2]
    assert run(events, "--head") == {"events": 2, "head": logged[1]}


def test_heads_noted_earlier_are_found_by_fsck(logged, run) -> None:
    for noted in logged:
        found = run(fsck, "--head", noted)
        assert (found["remaining"], found["head"]) == (0, logged[1])


def test_fsck_tells_a_log_that_was_cut_off(hub, logged, run) -> None:
    with hub.transaction() as session:
        session.connection().execute(text("DELETE FROM event WHERE id = 2"))

    assert run(fsck)["findings"] == []
    with pytest.raises(DataError, match="1 of the hub's rows"):
        run(fsck, "--head", logged[1])


def test_fsck_names_the_first_event_that_was_changed(hub, logged, run) -> None:
    with hub.transaction() as session:
        session.connection().execute(text("UPDATE event SET subject = 'zoo/plum' WHERE id = 2"))

    (finding,) = check(hub)
    assert (finding.level, finding.subject, finding.fix) == ("error", "event 2 (registered zoo/plum)", None)
    assert "the 1 events before it are sound" in finding.way_out
    with pytest.raises(DataError):
        run(fsck, "--fix")


def test_a_head_that_is_none_is_refused(hub, run) -> None:
    with pytest.raises(click.BadParameter, match="modelgrove events --head"):
        run(fsck, "--head", "ABC")
