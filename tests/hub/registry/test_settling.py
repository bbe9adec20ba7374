"""Questions that trees ask of both databases."""

from __future__ import annotations

import pytest

from modelgrove_hub.registry.lineage import add_edge
from modelgrove_hub.registry.trees import find_root, place, settle, tree_names
from modelgrove_hub.store.blobs import BlobStore
from modelgrove_hub.tables import Relation


@pytest.fixture
def store(tmp_path):
    return BlobStore(str(tmp_path))


def put(model, tree, by):
    model.tree, model.tree_reason = tree, {"by": by, "said": "so"}


def test_only_what_no_weights_have_decided_is_settled(session, add, store):
    sure, unsure, without = (
        add(f"a/{name}", content)[0] for name, content in (("sure", "1"), ("not", "2"), ("no", "3"))
    )
    put(sure, "sd1", "weights")
    put(unsure, "sd1", "family")
    put(without, None, "none")
    session.flush()
    settle(session, store, "sd1")
    assert [model.tree_reason["said"] == "so" for model in (sure, unsure, without)] == [True, False, False]
    assert {model.tree for model in (sure, unsure, without)} == {"sd1"}
    assert without.tree_reason["by"] == "family"


def test_without_weights_to_compare_two_trees_are_none(session, add, store):
    put(add("a/one", "1")[0], "sd1", "weights")
    put(add("a/two", "2")[0], "sd1:a/two", "founder")
    session.flush()
    assert tree_names(session, "sd1") == ["sd1", "sd1:a/two"]
    model = add("a/new", "3")[0]
    place(session, store, model)
    assert model.tree is None
    assert "family sd1 has the trees sd1, sd1:a/two" in model.tree_reason["said"]


def test_a_declared_base_that_nothing_compares_is_neither_believed_nor_doubted(session, add, store):
    base = add("a/base", "1", kind="checkpoint")[0]
    put(base, "sd1", "founder")
    model = add("a/new", "2", declared_base="a/base")[0]
    place(session, store, model)
    assert (model.tree, model.tree_reason["by"], model.tree_reason["declared_agrees"]) == ("sd1", "family", None)


def test_the_root_is_the_oldest_that_came_from_no_other_of_the_tree(session, add):
    (child, its, _), (root, theirs, _), (late, *_) = (
        add(f"a/{name}", content, kind="checkpoint") for name, content in (("child", "1"), ("root", "2"), ("late", "3"))
    )
    for model in (child, root, late):
        put(model, "sd1", "weights")
    session.flush()
    assert find_root(session, "sd1") == child
    add_edge(session, its, theirs, Relation.FINETUNE)
    assert find_root(session, "sd1") == root
    assert find_root(session, "sd2") is None
