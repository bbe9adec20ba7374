"""Two workers register at the same time, each in a transaction of its own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256

import pytest
from sqlalchemy import Engine
from sqlmodel import select

from modelgrove_hub.registry.blobs import name_blobs
from modelgrove_hub.registry.database import reading, transaction
from modelgrove_hub.registry.models import add_revision
from modelgrove_hub.registry.names import free_name
from modelgrove_hub.tables import Blob

WORKERS = 6


def register(engine: Engine, content: str, start: threading.Barrier) -> tuple[str, bool]:
    digest = sha256(content.encode()).hexdigest()
    files = {"model.safetensors": digest}
    start.wait()
    with transaction(engine) as session:
        name_blobs(session, [Blob(sha256=digest, size=1)])
        model, _, created = add_revision(
            session, name=free_name(session, "zoo/apple", files), files=files, manifests={}, kind="adapter",
            family="sd1", adapter_type="lora", declared_base=None, licence=None, tags=[], card="", trust="ok",
            summary={}, weights_hash=None, values_hash=None, inventory_hash=None, parameters=1, size=1,
        )  # fmt: skip
        return model.name, created


@pytest.mark.parametrize("round_", range(3))
def test_other_content_gets_another_name(engine: Engine, round_: int) -> None:
    start = threading.Barrier(WORKERS)
    with ThreadPoolExecutor(WORKERS) as pool:
        tasks = [pool.submit(register, engine, f"{round_} {number}", start) for number in range(WORKERS)]
    found = [task.result() for task in tasks]
    assert len({name for name, _ in found}) == WORKERS
    assert all(created for _, created in found)


def test_the_same_content_is_one_revision(engine: Engine) -> None:
    start = threading.Barrier(WORKERS)
    with ThreadPoolExecutor(WORKERS) as pool:
        tasks = [pool.submit(register, engine, "the same", start) for _ in range(WORKERS)]
    found = [task.result() for task in tasks]
    assert {name for name, _ in found} == {"zoo/apple"}
    assert sum(created for _, created in found) == 1


def test_two_jobs_may_name_each_others_blobs_in_any_order(engine: Engine) -> None:
    """One keeps as an artefact what the other makes a model of, and the reverse."""
    both_named_one = threading.Barrier(2)

    def finish(first: str, second: str) -> None:
        with transaction(engine) as session:
            name_blobs(session, [Blob(sha256=first, size=1)])
            with suppress(threading.BrokenBarrierError):  # where one waits for the other's end, they do not meet
                both_named_one.wait(timeout=1)
            name_blobs(session, [Blob(sha256=second, size=1)])

    one, other = "1" * 64, "2" * 64
    with ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(finish, one, other), pool.submit(finish, other, one)]
    assert [task.result() for task in tasks] == [None, None]
    with reading(engine) as session:
        assert set(session.exec(select(Blob.sha256))) == {one, other}
