"""Columns are handed out once, by whichever process asks, on both databases."""

from __future__ import annotations

from multiprocessing import get_context
from multiprocessing.queues import Queue
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlmodel import Session, select

from modelgrove_hub.errors import ConflictError, NotFoundError, UsageError
from modelgrove_hub.registry.database import connect, reading, transaction
from modelgrove_hub.registry.models import remove
from modelgrove_hub.registry.shared_bases import assign, bases, gaps, ranges_of, release
from modelgrove_hub.tables import Event

TREE = "sd1"


def ranges(session: Session) -> list[tuple[str, int, int]]:
    return [(one.concept, one.start, one.rank) for one in ranges_of(session, TREE)]


def test_each_concept_gets_the_lowest_free_columns(session: Session) -> None:
    first = assign(session, TREE, "cat", 16, width=320)
    assert first.made
    assert (first.columns.base, first.columns.start, first.columns.rank) == (TREE, 0, 16)
    assign(session, TREE, "dog", 4)
    assign(session, TREE, "owl", 16)
    assert ranges(session) == [("cat", 0, 16), ("dog", 16, 4), ("owl", 20, 16)]
    assert not first.columns.overlaps(assign(session, TREE, "dog", 4).columns)


def test_asking_again_gives_the_same_columns(session: Session) -> None:
    first = assign(session, TREE, "cat", 16, width=320)
    again = assign(session, TREE, "cat", 16)
    assert again.columns == first.columns
    assert (first.made, again.made) == (True, False)
    assert len(ranges(session)) == 1


def test_another_rank_for_the_same_concept_is_a_conflict(session: Session) -> None:
    assign(session, TREE, "cat", 16, width=320)
    with pytest.raises(ConflictError, match=r"columns 0 to 15 .* rank 16 and not 8: release"):
        assign(session, TREE, "cat", 8)


def test_a_full_basis_refuses_with_the_numbers(session: Session) -> None:
    for concept, rank in (("cat", 4), ("dog", 4), ("owl", 4)):
        assign(session, TREE, concept, rank, width=14)
    release(session, TREE, "cat")
    with pytest.raises(ConflictError, match=r"rank 5: of 14 columns 6 are free, 4 of them side by side; 2 concepts"):
        assign(session, TREE, "fox", 5)
    assert assign(session, TREE, "fox", 4).columns.start == 0
    assert assign(session, TREE, "hen", 2).columns.start == 12
    with pytest.raises(ConflictError, match=r"of 14 columns 0 are free, 0 of them"):
        assign(session, TREE, "ant", 1)


def test_released_columns_are_free_and_the_seed_stays(session: Session) -> None:
    first = assign(session, TREE, "cat", 4, width=8)
    assert release(session, TREE, "cat") == first.columns
    assert ranges(session) == []
    assert assign(session, TREE, "dog", 4).columns == first.columns
    with pytest.raises(NotFoundError, match="cat has no columns of the basis of sd1; dog has"):
        release(session, TREE, "cat")
    with pytest.raises(NotFoundError, match="no concept has"):
        release(session, "flux", "cat")


def test_released_and_assigned_in_one_transaction(session: Session) -> None:
    assign(session, TREE, "cat", 4, width=8)
    release(session, TREE, "cat")
    assert assign(session, TREE, "cat", 8).columns.rank == 8


def test_each_tree_has_a_basis_of_its_own(session: Session) -> None:
    one, other = assign(session, TREE, "cat", 4, width=8), assign(session, "sdxl", "cat", 4, width=640)
    assert (one.columns.start, other.columns.start) == (0, 0)
    assert one.columns.seed != other.columns.seed  # 32 random bits each
    assert [(basis.tree, basis.columns) for basis in bases(session)] == [(TREE, 8), ("sdxl", 640)]


def test_a_basis_keeps_its_width(session: Session) -> None:
    with pytest.raises(UsageError, match="no basis yet"):
        assign(session, TREE, "cat", 4)
    assign(session, TREE, "cat", 4, width=8)
    with pytest.raises(ConflictError, match="8 inputs and more, not 16"):
        assign(session, TREE, "dog", 4, width=16)


@pytest.mark.parametrize(
    ("concept", "rank", "width"),
    [("", 4, 8), (" ", 4, 8), ("a\nb", 4, 8), ("c" * 201, 4, 8), ("cat", 0, 8), ("cat", 4, 0)],
)
def test_what_cannot_be_is_refused(session: Session, concept: str, rank: int, width: int) -> None:
    with pytest.raises(UsageError):
        assign(session, TREE, concept, rank, width)
    assert bases(session) == []


def test_a_removed_model_keeps_its_columns(session: Session, add: Any) -> None:
    add("local/cat")
    assign(session, TREE, "local/cat", 4, width=8)
    remove(session, "local/cat")
    assert ranges(session) == [("local/cat", 0, 4)]


def test_gaps_are_what_no_range_has(session: Session) -> None:
    for concept in "abcd":
        assign(session, TREE, concept, 2, width=9)
    for concept in "ac":
        release(session, TREE, concept)
    (basis,) = bases(session)
    assert gaps(basis, ranges_of(session, TREE)) == [(0, 2), (4, 2), (8, 1)]


def test_what_was_handed_out_and_taken_back_is_in_the_audit_trail(session: Session) -> None:
    assign(session, TREE, "cat", 4, width=8)
    assign(session, TREE, "cat", 4)
    release(session, TREE, "cat")
    events = session.exec(select(Event).where(Event.subject == TREE).order_by(Event.id)).all()
    assert [event.action for event in events] == ["basis assigned", "basis released"]
    assert events[0].detail == {"concept": "cat", "start": 0, "rank": 4}


def _ask(url: str, names: list[str], found: Queue[Any]) -> None:
    engine = connect(url)
    try:
        for name in names:
            with transaction(engine) as session:
                columns = assign(session, TREE, name, 3, width=320).columns
            found.put((name, columns.seed, columns.start, columns.stop))
    finally:
        engine.dispose()


def test_processes_that_ask_at_once_never_get_the_same_columns(engine: Engine, database_url: str) -> None:
    # Three of the names are asked for by all processes, the others by one each.
    context = get_context("fork")
    found: Queue[Any] = context.Queue()
    names = [[f"shared {n}" for n in range(3)] + [f"{process} {n}" for n in range(8)] for process in range(4)]
    rivals = [context.Process(target=_ask, args=(database_url, own, found)) for own in names]
    for rival in rivals:
        rival.start()
    for rival in rivals:  # what they say fits into a pipe, so they end before it is read
        rival.join(60)
    assert [rival.exitcode for rival in rivals] == [0] * 4
    answers = [found.get(timeout=60) for _ in range(4 * 11)]
    assert len({seed for _, seed, _, _ in answers}) == 1
    by_name = {name: (start, stop) for name, _, start, stop in answers}
    assert len(set(answers)) == len(by_name) == 3 + 4 * 8
    taken = [column for start, stop in by_name.values() for column in range(start, stop)]
    assert sorted(taken) == list(range(3 * len(by_name)))
    with reading(engine) as session:
        assert len(ranges_of(session, TREE)) == len(by_name)
