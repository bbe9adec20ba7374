"""An open hub with all tables on both databases, and short ways to put models and vectors into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sqlmodel import SQLModel

from modelgrove_hub.hub import Hub
from modelgrove_hub.registry.commits import Said, commit
from modelgrove_hub.search.background import Background
from modelgrove_hub.search.text import SPACE
from modelgrove_hub.settings import Settings
from modelgrove_hub.tables import Embedding, Model, Revision

Register = Callable[..., int]
Vectors = Sequence[NDArray[np.float32]] | NDArray[np.float32]


@pytest.fixture
def hub(tmp_path: Path, database_url: str) -> Iterator[Hub]:
    opened = Hub.open(Settings(home=tmp_path, database_url=database_url))
    SQLModel.metadata.create_all(opened.engine)
    yield opened
    opened.engine.dispose()


@pytest.fixture
def background() -> Background:
    """Forty prompts in a small text space of eight dimensions."""
    return Background(np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32), "test")


@pytest.fixture
def register(hub: Hub) -> Register:
    """register(name, **facts) → the id of a new revision of that model, without files."""

    def add(name: str, *, digest: str = "0", summary: dict[str, Any] | None = None, **facts: Any) -> int:
        facts = {"kind": "adapter", "family": "zoo", "adapter_type": "lora", **facts}
        with hub.transaction() as session:
            model = Model(name=name, **{"tree": facts["family"], **facts})
            session.add(model)
            session.flush()
            revision = Revision(model_id=model.id, digest=(name + digest)[:64], summary=summary or {})
            session.add(revision)
            session.flush()
            commit(session, model, revision, Said())
            return int(revision.id)

    return add


@pytest.fixture
def embed(hub: Hub) -> Callable[..., None]:
    """embed({revision: vector}, side=…) writes Embedding rows in one transaction."""

    def write(vectors: dict[int, NDArray[np.float32]], side: str = "weights", expert: int | None = None) -> None:
        with hub.transaction() as session:
            for revision, vector in vectors.items():
                data = np.asarray(vector, "<f4").tobytes()
                session.add(Embedding(revision_id=revision, side=side, text_space=SPACE, expert_id=expert, vector=data))

    return write
