"""Events live and die with the transaction that they tell of."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine
from sqlmodel import select

from modelgrove_hub.registry.database import transaction
from modelgrove_hub.registry.events import record
from modelgrove_hub.tables import Event


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
