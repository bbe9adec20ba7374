"""`modelgrove key`, `mark`, `verify` and `attack`, with the work done in this process."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from sqlmodel import select

from modelgrove_hub.cli.key import key
from modelgrove_hub.cli.mark import attack, mark, verify
from modelgrove_hub.errors import JobFailedError, NotFoundError
from modelgrove_hub.tables import Edge


@pytest.fixture
def model(register, network):
    """The name of a registered network."""
    return register("net", network(0))


def test_a_key_is_made_listed_and_shown(run, hub):
    made = run(key, "new", "mine", "--bits", "64")
    assert made["bits"] == 64
    assert made["here"] is True
    assert run(key, "ls") == [made]
    assert run(key, "show", "mine") == made
    lines = run(key, "ls", text=True)
    assert "mine" in lines[1]
    secret = (hub.settings.home / "keys" / f"{made['id']}.key").read_text().strip()
    assert secret not in str(made) + "".join(run(key, "show", "mine", text=True))


def test_marked_verified_attacked_and_found_again(run, hub, model):
    run(key, "new", "mine")
    job = run(mark, model, "--key", "mine", "--margin", "6", "--name", "net-marked", "--local")
    (marked,) = job["outputs"]["models"]
    with hub.reading() as session:
        assert [edge.relation for edge in session.exec(select(Edge).where(Edge.inferred == False))] == ["edit"]  # noqa: E712
    report = run(verify, marked, "--key", "mine", "--local")["outputs"]["report"]
    assert report["decision"] == "verified"
    assert report["key"]["committed_before_the_model"] is True
    (attacked,) = run(attack, marked, "--kind", "prune", "--sparsity", "0.5", "--local")["outputs"]["models"]
    assert run(verify, attacked, "--key", "mine", "--reference", model, "--local", text=True) == ["verified"]
    assert run(verify, model, "--key", "mine", "--local", text=True) == ["no evidence found"]


def test_the_marked_model_is_no_reference(run, model):
    run(key, "new", "mine")
    (marked,) = run(mark, model, "--key", "mine", "--local")["outputs"]["models"]
    with pytest.raises(JobFailedError, match="shows the key itself"):
        run(verify, model, "--key", "mine", "--reference", marked, "--local")


def test_people_are_told_what_was_read_back(hub, model):
    runner = CliRunner()
    runner.invoke(key, ["new", "mine"], standalone_mode=False)
    result = runner.invoke(mark, [model, "--key", "mine", "--local"], standalone_mode=False)
    assert "int4: 128 of 128 bits agree" in result.stderr
    assert "matrices changed by" in result.stderr


def test_an_unknown_key_is_named(run, model):
    with pytest.raises(NotFoundError, match="no key 'other' was committed here"):
        run(mark, model, "--key", "other", "--local")


def test_attack_has_no_method_and_mark_has_one():
    runner = CliRunner()
    assert "--method" in runner.invoke(mark, ["--help"]).output
    shown = runner.invoke(attack, ["--help"]).output
    assert "--method" not in shown
    assert "--sparsity" in shown
