"""Two workers register at the same time, each in a transaction of its own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import pytest
from sqlalchemy import Engine

from modelgrove_hub.registry.blobs import name_blob
from modelgrove_hub.registry.database import transaction
from modelgrove_hub.registry.models import add_revision, free_name
from modelgrove_hub.tables import Blob

WORKERS = 6


def register(engine: Engine, content: str, start: threading.Barrier) -> tuple[str, bool]:
    digest = sha256(content.encode()).hexdigest()
    files = {"model.safetensors": digest}
    start.wait()
    with transaction(engine) as session:
        name_blob(session, Blob(sha256=digest, size=1))
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
