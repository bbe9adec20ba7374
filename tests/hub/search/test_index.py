import pickle
import subprocess
import sys

import numpy as np
import pytest
from sqlmodel import col, delete

from modelgrove_hub.errors import StorageError
from modelgrove_hub.search import index as module
from modelgrove_hub.search import vectors as kinds
from modelgrove_hub.search.index import open_index
from modelgrove_hub.search.index_file import read_index
from modelgrove_hub.search.text import SPACE
from modelgrove_hub.tables import Embedding, Model

QUERY = np.arange(8, dtype=np.float32)


def draw(count, seed=1):
    return np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)


@pytest.fixture
def filled(hub, register, embed):
    """Twenty revisions with vectors: ids and vectors."""
    ids = [register(f"owner/m{i}") for i in range(20)]
    vectors = draw(20)
    embed(dict(zip(ids, vectors, strict=True)))
    return ids, vectors


def wanted(ids, vectors, background, query=QUERY):
    """The ids in the order of z-scores computed from their definition."""
    z = []
    for vector in vectors:
        scores = background.vectors @ vector
        z.append((vector @ query - 0) / scores.std())
    return [ids[i] for i in np.argsort(-np.array(z))]


def order(index, limit=100):
    return [revision for revision, _ in index.search(QUERY, limit)]


def test_an_index_ranks_all_vectors_exactly_by_scaled_inner_product(hub, filled, background):
    ids, vectors = filled
    assert order(open_index(hub, "weights", SPACE, background)) == wanted(ids, vectors, background)


def test_search_can_be_restricted_to_some_ids(hub, filled, background):
    ids, vectors = filled
    found = open_index(hub, "weights", SPACE, background).search(QUERY, 3, allowed=ids[:5])
    assert [revision for revision, _ in found] == wanted(ids[:5], vectors[:5], background)[:3]


def test_an_index_without_vectors_finds_nothing(hub, background):
    index = open_index(hub, "card", SPACE, background)
    assert index.search(QUERY, 5) == []
    assert index.search(QUERY, 5, allowed=[]) == []


def test_a_saved_index_is_loaded_as_it_is(hub, filled, background):
    before = open_index(hub, "weights", SPACE, background)
    file = hub.settings.index / f"weights-{SPACE}.faiss"
    written = file.stat().st_mtime_ns
    assert order(open_index(hub, "weights", SPACE, background)) == order(before)
    assert file.stat().st_mtime_ns == written


def test_new_changed_and_removed_rows_reach_the_index(hub, filled, register, embed, background):
    ids, vectors = filled
    open_index(hub, "weights", SPACE, background)
    with hub.transaction() as session:
        session.exec(delete(Model).where(col(Model.name) == "owner/m0"))
        session.exec(delete(Embedding).where(col(Embedding.revision_id) == ids[1]))
    fresh = draw(2, seed=2)
    added = register("owner/new")
    embed({ids[1]: fresh[0], added: fresh[1]})
    expected = wanted([*ids[1:], added], [fresh[0], *vectors[2:], fresh[1]], background)
    assert order(open_index(hub, "weights", SPACE, background)) == expected


def test_other_background_prompts_give_another_index(hub, filled, background):
    ids, vectors = filled
    open_index(hub, "weights", SPACE, background)
    other = type(background)(draw(40, seed=9) * np.arange(8, dtype=np.float32), "other")
    assert order(open_index(hub, "weights", SPACE, other)) == wanted(ids, vectors, other)


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b[:-1] + bytes([b[-1] ^ 1]),
        lambda b: b[:4200] + bytes([b[4200] ^ 1]) + b[4201:],
        lambda b: b"",
        lambda b: b"{}\n",
    ],
)
def test_a_damaged_file_is_set_aside_and_made_again(hub, filled, background, damage):
    ids, vectors = filled
    open_index(hub, "weights", SPACE, background)
    file = hub.settings.index / f"weights-{SPACE}.faiss"
    broken = damage(file.read_bytes())
    file.write_bytes(broken)
    assert order(open_index(hub, "weights", SPACE, background)) == wanted(ids, vectors, background)
    aside = list(hub.settings.index.glob("*.bad-*"))
    assert [path.read_bytes() for path in aside] == [broken]
    assert read_index(file)[1].count == 20


def file_of(hub):
    return hub.settings.index / f"weights-{SPACE}.faiss"


def test_an_index_stays_in_memory_until_rows_or_file_change(hub, filled, background):
    first = open_index(hub, "weights", SPACE, background)
    assert open_index(hub, "weights", SPACE, background) is first
    file_of(hub).touch()
    assert open_index(hub, "weights", SPACE, background) is not first


def test_a_missing_file_is_made_again(hub, filled, background):
    first = open_index(hub, "weights", SPACE, background)
    file_of(hub).unlink()
    assert order(open_index(hub, "weights", SPACE, background)) == order(first)
    assert file_of(hub).exists()


def test_few_changes_are_not_written_and_yet_seen_by_all(hub, filled, register, embed, background, monkeypatch):
    ids, vectors = filled
    before = open_index(hub, "weights", SPACE, background)
    written = file_of(hub).stat()
    monkeypatch.setattr(module, "_UNSAVED", 0.1)
    fresh = draw(3, seed=3)
    for number, vector in enumerate(fresh):
        ids = [*ids, register(f"owner/new{number}")]
        vectors = np.array([*vectors, vector])
        embed({ids[-1]: vector})
        assert order(open_index(hub, "weights", SPACE, background)) == wanted(ids, vectors, background)
        if number < 2:
            assert file_of(hub).stat().st_mtime_ns == written.st_mtime_ns
            module._opened.clear()  # as in a new process
            assert order(open_index(hub, "weights", SPACE, background)) == wanted(ids, vectors, background)
    assert file_of(hub).stat().st_ino != written.st_ino
    assert len(before) == 20  # who searches the old one is not disturbed


def test_the_last_vector_made_anew_is_noticed(hub, filled, embed, background):
    # SQLite gives the row the id that the old one had.
    ids, vectors = filled
    open_index(hub, "weights", SPACE, background)
    with hub.transaction() as session:
        session.exec(delete(Embedding).where(col(Embedding.revision_id) == ids[-1]))
    vectors[-1] = draw(1, seed=5)[0]
    embed({ids[-1]: vectors[-1]})
    assert order(open_index(hub, "weights", SPACE, background)) == wanted(ids, vectors, background)


def test_an_index_changes_its_kind_when_it_grows_and_when_it_shrinks(hub, filled, register, embed, background):
    ids, vectors = filled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds, "FLAT_UP_TO", 24)
        assert open_index(hub, "weights", SPACE, background).lists == 0
        more = [register(f"owner/more{i}") for i in range(10)]
        embed(dict(zip(more, draw(10, seed=4), strict=True)))
        index = open_index(hub, "weights", SPACE, background)
        assert index.lists == 8
        assert index.ids.tolist() == [*ids, *more]
        remove(hub, more)
        assert open_index(hub, "weights", SPACE, background).lists == 8
        remove(hub, ids[12:])
        index = open_index(hub, "weights", SPACE, background)
        assert index.lists == 0
        assert order(index) == wanted(ids[:12], vectors[:12], background)


def remove(hub, revisions):
    with hub.transaction() as session:
        session.exec(delete(Embedding).where(col(Embedding.revision_id).in_(revisions)))


OPEN = """
import pickle, sys
from modelgrove_hub.hub import Hub
from modelgrove_hub.settings import Settings
from modelgrove_hub.search.index import open_index
from modelgrove_hub.search.text import SPACE
home, url, background = pickle.load(sys.stdin.buffer)
assert len(open_index(Hub.open(Settings(home=home, database_url=url)), "weights", SPACE, background)) == 20
"""


def test_processes_that_start_together_leave_one_whole_file(hub, filled, background):
    url = hub.engine.url.render_as_string(hide_password=False)
    said = pickle.dumps((hub.settings.home, url, background))
    several = [subprocess.Popen([sys.executable, "-I", "-c", OPEN], stdin=subprocess.PIPE) for _ in range(3)]
    for process in several:
        process.stdin.write(said)
        process.stdin.close()
    assert [process.wait() for process in several] == [0, 0, 0]
    assert sorted(path.name for path in hub.settings.index.iterdir()) == [f"weights-{SPACE}.faiss", "writer.lock"]


def test_without_faiss_the_error_says_what_to_install(hub, background, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(StorageError, match=r"pip install modelgrove\[cpu\]"):
        open_index(hub, "weights", SPACE, background)
