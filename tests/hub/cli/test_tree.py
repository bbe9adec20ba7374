import pytest

from modelgrove_hub.cli.tree import tree
from modelgrove_hub.errors import UsageError
from modelgrove_hub.registry.lineage import parents
from modelgrove_hub.registry.models import find_revision


def moved(weights, noise):
    return {name: tensor + 0.2 * noise[name] for name, tensor in weights.items()}


@pytest.fixture
def family(register, network):
    tuned = moved(network(0), network(1))
    weights = {"net": network(0), "tuned": tuned, "tuned-more": moved(tuned, network(2))}
    return [register(name, one) for name, one in weights.items()]


def test_the_tree_is_drawn_and_recorded_as_inferred(hub, family, run):
    base, tuned, more = family

    lines = run(tree, more, text=True)

    assert [line.partition("  (")[0] for line in lines] == [base, f"└─ {tuned}", f"   └─ {more}"]
    assert "fine-tune" in lines[2]
    assert "declared" not in lines[2]
    with hub.reading() as session:
        (link,) = parents(session, find_revision(session, more))
    assert (link.model.name, link.edge.relation, link.edge.inferred) == (tuned, "finetune", True)
    assert link.edge.evidence["kept"] == pytest.approx(1, abs=0.2)


def test_what_was_inferred_before_is_replaced(hub, family, run):
    first = run(tree, family[0])
    again = run(tree, family[2], "--no-times")

    assert first == again
    with hub.reading() as session:
        assert len(parents(session, find_revision(session, family[2]))) == 1


def test_a_model_without_a_tree_is_refused_with_the_reason(register, network, run):
    alone = register("alone", network(5))

    with pytest.raises(UsageError, match="agree with no other model"):
        run(tree, alone)
