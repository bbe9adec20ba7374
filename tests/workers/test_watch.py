"""A folder that changes makes its source due."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlmodel import select, update

from modelgrove_hub.hub import Hub
from modelgrove_hub.settings import Settings
from modelgrove_hub.tables import Source, now
from modelgrove_migrations.run import upgrade
from modelgrove_workers.watch import Watcher, make_due, watched


@pytest.fixture
def hub(tmp_path):
    opened = Hub.open(Settings(home=tmp_path / "hub"))
    upgrade(opened.settings.database)
    yield opened
    opened.engine.dispose()


def add(hub, folder, **facts):
    with hub.transaction() as session:
        later = now() + timedelta(hours=1)
        name = f"s{len(session.exec(select(Source)).all())}"
        session.add(Source(**{"name": name, "plugin": "source.folder", "url": str(folder), "next_run": later, **facts}))


def due(hub):
    with hub.reading() as session:
        return list(session.exec(select(Source.name).where(Source.next_run <= now())))


def test_only_scheduled_folders_that_are_there_are_watched(hub, tmp_path):
    (tmp_path / "a").mkdir()
    add(hub, tmp_path / "a")
    add(hub, tmp_path / "a", next_run=None)
    add(hub, tmp_path / "a", paused=True)
    add(hub, tmp_path / "a", params={"watch": False})
    add(hub, tmp_path / "missing")
    add(hub, "hf://ann", plugin="source.huggingface")
    assert watched(hub) == {1: (tmp_path / "a").resolve()}


def test_a_change_makes_its_source_due_and_no_other(hub, tmp_path, waiting):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        add(hub, tmp_path / name)
    watcher = Watcher(hub)
    watcher.start()
    try:
        number = iter(range(1_000_000))

        def changed():
            (tmp_path / f"a/{next(number)}").touch()  # again and again: when watching began is not known
            return due(hub)

        waiting(changed, "the source of the folder is due")
        assert due(hub) == ["s0"]
    finally:
        watcher.stop()


def test_one_that_is_due_or_has_no_schedule_is_left_alone(hub, tmp_path):
    add(hub, tmp_path)
    add(hub, tmp_path, next_run=None)
    assert make_due(hub, [1, 2]) == 1
    assert make_due(hub, [1, 2]) == 0
    with hub.transaction() as session:
        session.exec(update(Source).values(next_run=None))
    assert make_due(hub, [1]) == 0
