import json
from importlib.metadata import entry_points

import pytest
import torch
from click.testing import CliRunner

from modelgrove_hub.plugins import check_params


@pytest.fixture
def at_hand(bench, monkeypatch):
    """Runs in this process: one of its own could not import the bench as pytest loads it."""

    def measure(method, parameters, model, peers):
        return {"method": method, "parameters": parameters, **bench._run(method, parameters, model, peers)}

    monkeypatch.setattr(bench, "measure", measure)
    return bench


@pytest.fixture
def few_pictures(monkeypatch):
    monkeypatch.setattr("modelgrove_plugins.compress.fidelity.PROMPTS", ("a red apple",))


def answered(bench, *arguments):
    return CliRunner().invoke(bench.main, arguments)


def test_every_row_is_a_run_its_plugin_takes(bench):
    for method, given in (*(row for rows in bench.ROWS.values() for row in rows), *bench.QUICK):
        (plugin,) = entry_points(group="modelgrove.plugins", name=f"compressor.{method}")
        checked = check_params(plugin.load(), given)
        assert {name: getattr(checked, name) for name in given} == given


@pytest.mark.usefixtures("few_pictures")
def test_a_quick_run_answers_with_json(at_hand, monkeypatch):
    monkeypatch.setattr(at_hand, "QUICK", (("rtn", {"bits": 4}),))
    done = answered(at_hand, "--quick", "--json")
    found = json.loads(done.stdout)
    [row] = found["results"]
    assert found["model"] == "zoo-base"
    assert (row["method"], row["parameters"]) == ("rtn", {"bits": 4})
    assert 0.3 < row["ratio"] < 0.45  # half a byte a weight of two, and what is kept
    assert 0 < row["error"] < 0.1
    assert 20 < row["psnr_db"] < 50
    assert row["bytes"] > 1e6
    assert row["seconds"] > 0
    assert row["peak_mib"] > 100
    assert [json.loads(line) for line in done.stderr.splitlines()] == [row]


def test_a_row_that_fails_says_why_and_the_others_are_measured(at_hand, monkeypatch):
    kept = {"bits": 8, "fidelity": False}
    monkeypatch.setattr(at_hand, "QUICK", (("rtn", {"skip": ("*",)}), ("rtn", kept)))
    done = answered(at_hand, "--quick", "--json")
    failed, fine = json.loads(done.stdout)["results"]
    assert "nothing to quantize" in failed["failed"]
    assert fine["error"] is None
    assert 0.5 < fine["ratio"] < 0.6
    assert done.exit_code == 0


def test_what_was_measured_is_shown_after_an_interruption(bench, monkeypatch):
    row = {"bytes": 2**21, "ratio": 0.5, "error": 1e-3, "psnr_db": None, "seconds": 1.0, "peak_mib": 100.0}

    def measure(method, parameters, model, peers):
        if parameters["bits"] == 4:
            raise KeyboardInterrupt
        return {"method": method, "parameters": parameters, **row}

    monkeypatch.setattr(bench, "measure", measure)
    done = answered(bench, "--quick")
    assert done.exit_code == 1
    assert "bits=8" in done.stdout
    assert "2.00" in done.stdout
    assert "bits=4" not in done.stdout


def test_the_table_of_a_failed_row_has_its_reason(bench, capsys):
    bench.Console(width=140).print(bench.table("m", [{"method": "x", "parameters": {"a": 1}, "failed": "E: why"}]))
    assert "failed: E: why" in capsys.readouterr().out


@pytest.mark.usefixtures("few_pictures")
def test_a_peer_is_compared_like_a_plugin_and_its_bytes_are_those_it_holds(bench, monkeypatch, tmp_path):
    """A peer that rounds nothing, and holds a code of one byte for each weight and a scale of four for each row."""
    layers = []

    class Held(torch.nn.Parameter):
        def __tensor_flatten__(self):
            return ["codes", "scale"], None

    def quantize(network, names):
        layers.extend(names)
        for name in names:
            layer = network.get_submodule(name)
            weight = Held(layer.weight.detach(), requires_grad=False)
            weight.codes, weight.scale = torch.zeros(weight.shape, dtype=torch.int8), torch.zeros(len(weight))
            layer.weight = weight

    monkeypatch.setitem(bench.PEERS, "held", ("held", quantize))
    row = bench._run("held", {}, bench.BASE, tmp_path)
    assert (row["error"], row["psnr_db"]) == (0, None)
    plan = bench._run("rtn", {"bits": 8, "fidelity": False}, bench.BASE, None)
    # int8 of rtn has a float16 scale a row, the peer one of four bytes.
    assert 0 < row["bytes"] - plan["bytes"] < 0.01 * row["bytes"]
    assert "conv_in" not in layers
