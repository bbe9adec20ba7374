"""The ticker: any number may tick, and none may die."""

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlmodel import select, update

from modelgrove_hub.hub import Hub
from modelgrove_hub.jobs import rows
from modelgrove_hub.settings import Settings
from modelgrove_hub.tables import Job, Source, now
from modelgrove_migrations.run import upgrade
from modelgrove_workers.schedule import Ticker, reap, start_sources, tick


@pytest.fixture
def hub(tmp_path, database_url):
    config = Settings(home=tmp_path, database_url=database_url, lease_seconds=2)
    upgrade(config.database)
    opened = Hub.open(config)
    yield opened
    opened.engine.dispose()


@pytest.fixture
def add_source(hub):
    def add(**facts):
        facts = {
            "name": "shelf",
            "plugin": "shelf",
            "url": "file:///models",
            "schedule": "1h",
            "next_run": now(),
            **facts,
        }
        with hub.transaction() as session:
            session.add(Source(**facts))

    return add


def source_of(hub):
    with hub.transaction() as session:
        return session.exec(select(Source)).one()


def make_due(hub):
    with hub.transaction() as session:
        session.exec(update(Source).values(next_run=now()))


def test_a_silent_job_comes_back_and_is_told_by_the_next_tick(hub, tmp_path):
    job = rows.submit(hub, "steady", {"counter": str(tmp_path / "counter")})
    with hub.transaction() as session:
        rows.claim(session, job.id, "dead", lease_seconds=-1)
    tick(hub)

    found = rows.get(hub, job.id)
    assert (found.state, found.attempts) == ("queued", 1)
    assert found.published_at
    assert len(list((hub.settings.queue / "messages").iterdir())) == 1
    assert reap(hub) == 0


def test_a_due_source_is_run_once_by_any_number_of_tickers(hub, add_source):
    add_source(params={"max_models": 3})
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(start_sources, [hub] * 16)) == 1

    jobs = rows.list_jobs(hub)
    assert [(job.plugin, job.queue) for job in jobs] == [("source.shelf", "io")]
    assert {"url": "file:///models", "source": "shelf", "max_models": 3, "dry_run": False}.items() <= jobs[
        0
    ].params.items()
    with hub.transaction() as session:
        later = session.exec(select(Source.id).where(Source.next_run > now() + timedelta(minutes=59))).all()
    assert len(later) == 1


def test_a_source_that_still_runs_is_not_started_again(hub, add_source):
    add_source()
    assert start_sources(hub) == 1
    make_due(hub)
    assert start_sources(hub) == 0
    with hub.transaction() as session:
        session.exec(update(Job).values(state="done"))
    assert start_sources(hub) == 1
    assert len(rows.list_jobs(hub)) == 2


@pytest.mark.parametrize("facts", [{"paused": True}, {"next_run": None}, {"next_run": now() + timedelta(hours=1)}])
def test_a_source_that_is_not_due_rests(hub, add_source, facts):
    add_source(**facts)

    assert start_sources(hub) == 0


def test_a_source_without_a_plugin_is_logged_and_tried_again_at_its_next_time(hub, add_source, caplog):
    add_source(plugin="attic")
    assert start_sources(hub) == 0
    assert "source shelf: no plugin 'attic'" in caplog.text
    caplog.clear()
    assert start_sources(hub) == 0
    assert caplog.text == ""


def test_a_source_without_a_schedule_runs_this_once(hub, add_source):
    add_source(schedule="")
    assert start_sources(hub) == 1
    assert source_of(hub).next_run is None


def test_a_ticker_survives_a_database_that_is_away_and_any_surprise(tmp_path, caplog, monkeypatch):
    away = Hub.open(Settings(home=tmp_path, database_url="postgresql://postgres@127.0.0.1:1/none"))
    tick(away)
    assert caplog.text.count("now: database postgresql+psycopg://postgres@127.0.0.1:1/none") == 3

    monkeypatch.setattr("modelgrove_workers.schedule.recover", lambda *_: 1 / 0)
    with caplog.at_level(logging.ERROR):
        tick(away)
    assert "ZeroDivisionError" in caplog.text


def test_a_ticker_ticks_until_it_is_stopped(hub, tmp_path):
    ticker = Ticker(hub)
    ticker.start()
    job = rows.submit(hub, "steady", {"counter": str(tmp_path / "counter")})
    end = time.monotonic() + 30
    while rows.get(hub, job.id).published_at is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    ticker.stop()

    assert "ticker" not in {thread.name for thread in threading.enumerate()}
