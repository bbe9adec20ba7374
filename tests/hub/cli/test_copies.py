from modelgrove_hub.cli.copies import copies
from modelgrove_hub.registry.lineage import parents
from modelgrove_hub.registry.models import find_revision


def half(weights):
    return {name: tensor.half() for name, tensor in weights.items()}


def test_copies_are_found_told_and_recorded(hub, register, network, run):
    original, cast, other = (
        register("net", network(0)),
        register("half", half(network(0))),
        register("other", network(1)),
    )

    assert run(copies, text=True) == [f"{cast} is an fp16 copy of {original}"]

    with hub.transaction() as session:
        (link,) = parents(session, find_revision(session, cast))
        assert parents(session, find_revision(session, other)) == []
    assert (link.model.name, link.edge.relation, link.edge.inferred) == (original, "quantized", True)
    assert link.edge.evidence["values_agreeing"] == 1.0


def test_copies_of_one_model_are_compared_with_it_alone(register, network, run):
    one, two = register("one", network(0)), register("two", network(1))
    register("one-half", half(network(0)))
    cast = register("two-half", half(network(1)))

    report = run(copies, two)

    assert [(pair["child"], pair["parent"]) for pair in report["pairs"]] == [(cast, two)]
    assert one not in str(report)


def test_what_is_undecided_is_told_and_not_recorded(hub, register, network, run):
    # So slight a change that bf16 hides it, except in a few of 32,768 values.
    tuned = {name: tensor * (1 + 2e-6) for name, tensor in network(0).items()}
    base = register("net", network(0))
    close = register("close", {name: tensor.bfloat16() for name, tensor in tuned.items()})

    (pair,) = run(copies)["pairs"]

    assert (pair["verdict"], pair["child"], pair["parent"]) == ("undecided", close, base)
    with hub.transaction() as session:
        assert parents(session, find_revision(session, close)) == []
