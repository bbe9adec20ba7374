"""Edges are said once, and trees end whatever shape inference gives them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from sqlmodel import Session, select

from modelgrove_hub.errors import UsageError
from modelgrove_hub.registry.lineage import Node, add_edge, children, drop_inferred, parents, tree
from modelgrove_hub.tables import Edge, Model, Relation, Revision


@pytest.fixture
def family(session: Session, add) -> dict[str, Revision]:
    """base → tuned → small; base → lora; lora and tuned → merged."""
    names = ("base", "tuned", "small", "lora", "merged")
    people = {name: add(f"zoo/{name}", f"{number}")[1] for number, name in enumerate(names, 1)}
    add_edge(session, people["tuned"], people["base"], Relation.FINETUNE, inferred=True, score=0.9)
    add_edge(session, people["small"], people["tuned"], Relation.QUANTIZED, evidence={"job": "j1"})
    add_edge(session, people["lora"], people["base"], Relation.ADAPTER)
    add_edge(session, people["merged"], people["lora"], Relation.MERGE)
    add_edge(session, people["merged"], people["tuned"], Relation.MERGE)
    return people


def test_an_edge_said_twice_is_one_edge_with_the_newer_evidence(session: Session, family) -> None:
    before = len(session.exec(select(Edge)).all())

    edge = add_edge(
        session, family["tuned"], family["base"], Relation.FINETUNE, inferred=True, score=0.7, evidence={"n": 1}
    )

    assert (edge.score, edge.evidence) == (0.7, {"n": 1})
    assert len(session.exec(select(Edge)).all()) == before


def test_declared_and_inferred_are_different_edges(session: Session, family) -> None:
    add_edge(session, family["tuned"], family["base"], Relation.FINETUNE, inferred=False)

    assert [link.describe() for link in parents(session, family["tuned"])] == [
        "zoo/base (finetune, declared)",
        "zoo/base (finetune, inferred, 0.90)",
    ]


def test_what_was_inferred_is_forgotten_and_what_was_declared_stays(session: Session, family) -> None:
    add_edge(session, family["tuned"], family["base"], Relation.FINETUNE, inferred=False)
    add_edge(session, family["tuned"], family["base"], Relation.COPY, inferred=True)

    drop_inferred(session, family["tuned"], (Relation.FINETUNE, Relation.MERGE))

    assert {(link.edge.relation, link.edge.inferred) for link in parents(session, family["tuned"])} == {
        ("finetune", False),
        ("copy", True),
    }


def test_nothing_is_its_own_parent(session: Session, family) -> None:
    with pytest.raises(UsageError, match="its own parent"):
        add_edge(session, family["base"], family["base"], Relation.COPY)


def test_children_and_parents_are_each_others_mirror(session: Session, family) -> None:
    assert {link.model.name for link in children(session, family["base"])} == {"zoo/tuned", "zoo/lora"}
    assert {link.model.name for link in parents(session, family["merged"])} == {"zoo/tuned", "zoo/lora"}
    assert parents(session, family["base"]) == []


def test_a_tree_goes_up_to_the_ancestors_and_down_to_the_descendants(session: Session, family) -> None:
    node = tree(session, family["tuned"])

    assert (node.name, node.relation) == ("zoo/tuned", None)
    assert _shape(node, "parents") == {"zoo/tuned": [{"zoo/base": []}]}
    assert _shape(node, "children") == {"zoo/tuned": [{"zoo/small": []}, {"zoo/merged": []}]}
    assert (node.parents[0].inferred, node.parents[0].score) == (True, 0.9)
    assert node.children[0].evidence == {"job": "j1"}


def test_who_is_reached_twice_is_expanded_once(session: Session, family) -> None:
    node = tree(session, family["base"])

    merged = [leaf for child in node.children for leaf in child.children if leaf.name == "zoo/merged"]
    assert sorted(leaf.again for leaf in merged) == [False, True]


def test_a_loop_ends(session: Session, family) -> None:
    add_edge(session, family["base"], family["small"], Relation.FINETUNE, inferred=True)

    node = tree(session, family["base"])

    assert _shape(node, "parents") == {"zoo/base": [{"zoo/small": [{"zoo/tuned": [{"zoo/base": []}]}]}]}
    assert node.parents[0].parents[0].parents[0].again


def test_a_long_chain_is_cut_at_the_depth_asked_for(session: Session, crowd: list[Revision]) -> None:
    session.add_all([Edge(child_id=b.id, parent_id=a.id, relation="finetune") for a, b in pairwise(crowd)])
    session.flush()

    def length(node: Node) -> int:
        count = 0
        while node.children:
            node, count = node.children[0], count + 1
        return count

    assert length(tree(session, crowd[0], depth=5)) == 5
    assert length(tree(session, crowd[0], depth=2000)) == len(crowd) - 1


def test_a_base_of_many_children_shows_them_all(session: Session, crowd: list[Revision]) -> None:
    base, *rest = crowd
    session.add_all([Edge(child_id=child.id, parent_id=base.id, relation="adapter") for child in rest])
    session.flush()

    assert {node.revision_id for node in tree(session, base).children} == {child.id for child in rest}


@pytest.fixture
def crowd(session: Session) -> list[Revision]:
    """More revisions than one query asks for."""
    session.add(model := Model(name="zoo/crowd"))
    session.flush()
    revisions = [Revision(model_id=model.id, digest=f"{number:064x}") for number in range(520)]
    session.add_all(revisions)
    session.flush()
    return revisions


def _shape(node: Node, way: str) -> dict[str, list[object]]:
    return {node.name: [_shape(child, way) for child in getattr(node, way)]}
