"""Events live and die with the transaction that they tell of, and nobody changes the past unseen."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, select

from modelgrove_hub.registry.database import connect, transaction
from modelgrove_hub.registry.events import START, Chain, check_chain, head, list_events, record
from modelgrove_hub.tables import Event
from modelgrove_migrations.run import upgrade

LENGTH = 6


def test_an_event_is_kept_with_its_detail(engine: Engine) -> None:
    with transaction(engine) as session:
        record(session, "registered", "zoo/apple", files=2)

    with transaction(engine) as session:
        event = session.exec(select(Event)).one()
    assert (event.action, event.subject, event.detail) == ("registered", "zoo/apple", {"files": 2})


def test_an_event_of_a_transaction_that_failed_never_was(engine: Engine) -> None:
    def work() -> None:
        with transaction(engine) as session:
            record(session, "registered", "zoo/apple")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()

    with transaction(engine) as session:
        assert session.exec(select(Event)).all() == []
        assert head(session) == (0, START)
        assert check_chain(session) == Chain(0, START)


def test_the_hash_is_that_of_the_documented_text(session: Session) -> None:
    record(session, "registered", "zoo/apple")
    event = record(session, "registered", "zoo/größe", b=[1.5, None], a={"z": True, "10": 1, "9": 2})

    before = session.exec(select(Event.hash).where(Event.id == 1)).one()
    at = event.at.strftime("%Y-%m-%dT%H:%M:%S.%f+00:00")
    written = (
        f'{{"action":"registered","at":"{at}","detail":{{"a":{{"10":1,"9":2,"z":true}},"b":[1.5,null]}},'
        f'"id":2,"previous":"{before}","subject":"zoo/gr\\u00f6\\u00dfe"}}'
    )
    assert event.hash == hashlib.sha256(written.encode()).hexdigest()
    assert head(session) == (2, event.hash)
    assert [found.id for found in list_events(session, 1)] == [2]


def test_a_detail_that_is_no_json_is_refused(session: Session) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        record(session, "registered", "zoo/apple", score=float("nan"))


TAMPERINGS = st.one_of(
    st.tuples(st.just("change"), st.integers(1, LENGTH), st.sampled_from(["action", "subject", "detail", "at"])),
    st.tuples(st.just("hash"), st.integers(1, LENGTH), st.sampled_from(["hash", "previous"])),
    st.tuples(st.just("delete"), st.integers(1, LENGTH), st.none()),
    st.tuples(st.just("swap"), st.integers(1, LENGTH), st.integers(1, LENGTH)).filter(lambda told: told[1] != told[2]),
    st.tuples(st.just("insert"), st.integers(0, LENGTH), st.none()),
    st.tuples(st.just("renumber"), st.integers(1, LENGTH), st.integers(LENGTH + 1, 99)),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TAMPERINGS)
@example(("delete", LENGTH, None))
@example(("delete", 1, None))
def test_any_single_change_is_found_and_named(session: Session, tampering: tuple[str, int, Any]) -> None:
    session.rollback()
    for number in range(LENGTH):
        record(session, "registered", f"zoo/{number}", files=number)
    noted = head(session)[1]
    assert check_chain(session, noted) == Chain(LENGTH, noted)
    what, number, other = tampering

    _tamper(session, what, number, other)

    chain = check_chain(session, noted)
    assert chain.problem
    first = {"insert": number + 1, "swap": min(number, other) if what == "swap" else 0}.get(what, number)
    assert chain.sound == first - 1
    cut_off = (what, number) == ("delete", LENGTH)  # only the noted head tells
    assert chain.broken.startswith("event log" if cut_off else "event ")
    session.rollback()


def _tamper(session: Session, what: str, number: int, other: Any) -> None:
    connection = session.connection()
    values = {
        "action": "'removed'", "subject": "'zoo/x'", "detail": "'{\"files\": 99}'", "at": "'2020-01-01 00:00:00'",
        "hash": f"'{'e' * 64}'", "previous": f"'{'e' * 64}'",
    }  # fmt: skip
    if what in ("change", "hash"):
        connection.execute(text(f"UPDATE event SET {other} = {values[str(other)]} WHERE id = {number}"))
    elif what == "delete":
        connection.execute(text(f"DELETE FROM event WHERE id = {number}"))
    elif what == "renumber":
        connection.execute(text(f"UPDATE event SET id = {other} WHERE id = {number}"))
    elif what == "swap":
        for old, new in ((number, 1000), (other, number), (1000, other)):
            connection.execute(text(f"UPDATE event SET id = {new} WHERE id = {old}"))
    else:
        for old in range(LENGTH, number, -1):
            connection.execute(text(f"UPDATE event SET id = {old + 1} WHERE id = {old}"))
        forged = {"id": number + 1, "at": "2020-01-01 00:00:00", "previous": "f" * 64, "hash": "f" * 64}
        connection.execute(
            text(
                "INSERT INTO event (id, at, action, subject, detail, previous, hash) "
                "VALUES (:id, :at, 'removed', 'zoo/0', '{}', :previous, :hash)"
            ),
            forged,
        )


def test_a_log_written_anew_is_sound_in_itself_and_lacks_the_noted_head(session: Session) -> None:
    record(session, "registered", "zoo/apple")
    noted = head(session)[1]
    session.connection().execute(text("DELETE FROM event"))
    session.expire_all()
    record(session, "registered", "zoo/pear")

    assert check_chain(session).problem == ""
    assert check_chain(session, noted).problem.startswith(f"does not hold the head {noted}")


def test_a_head_noted_long_ago_is_still_found(session: Session) -> None:
    heads = [record(session, "registered", f"zoo/{number}").hash for number in range(3)]

    assert [check_chain(session, noted).problem for noted in heads] == ["", "", ""]


def test_a_chain_cannot_fork(session: Session) -> None:
    first = record(session, "registered", "zoo/apple")
    session.add(Event(id=9, action="removed", subject="zoo/apple", previous=first.previous, hash="f" * 64))

    with pytest.raises(IntegrityError):
        session.flush()
    session.rollback()


def test_bytes_that_are_no_json_are_a_fault_and_no_crash(sqlite_url: str) -> None:  # PostgreSQL takes no such bytes
    upgrade(sqlite_url)
    engine = connect(sqlite_url)
    with transaction(engine) as session:
        record(session, "registered", "zoo/apple")
        session.connection().execute(text("UPDATE event SET detail = '{'"))
        chain = check_chain(session)
    engine.dispose()
    assert chain.broken == "the event after number 0"
    assert chain.problem.startswith("cannot be read")


def test_threads_write_one_chain(engine: Engine) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda who: _write(engine, who), range(4)))

    _assert_whole(engine, 80)


def test_processes_write_one_chain(database_url: str, engine: Engine) -> None:
    writers = [get_context("fork").Process(target=_write_at, args=(database_url, who)) for who in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)

    assert [writer.exitcode for writer in writers] == [0, 0]
    _assert_whole(engine, 40)


def _write_at(url: str, who: int) -> None:
    engine = connect(url)
    _write(engine, who)
    engine.dispose()


def _write(engine: Engine, who: int) -> None:
    for number in range(10):
        with transaction(engine) as session:
            record(session, "registered", f"zoo/{who}-{number}")
            record(session, "attested", f"zoo/{who}-{number}")


def _assert_whole(engine: Engine, count: int) -> None:
    with transaction(engine) as session:
        chain = check_chain(session)
        ids = list(session.exec(select(Event.id).order_by(Event.id)))
    assert (chain.sound, chain.problem) == (count, "")
    assert ids == list(range(1, count + 1))
