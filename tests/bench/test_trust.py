"""What bench/trust.py counts: false positives as `verify` reads them, and every row of the table."""

import json

import pytest
from click.testing import CliRunner
from rich.console import Console

from modelgrove_hub.settings import settings
from modelgrove_hub.testing import FolderModel


@pytest.fixture
def lora(bench):
    return FolderModel(bench.ZOO / "sample" / bench.LORA, name=bench.LORA, adapter_type="lora")


def test_wrong_keys_are_counted_against_the_exact_law(bench, lora):
    found = bench.wrong_keys(lora, 600)
    assert found["keys"] == 600
    assert found["most_bits"] < 92
    # Either polarity has at least k bits with twice the tail's chance.
    assert found["levels"]["0.05"]["expected"] == pytest.approx(600 * 0.0416, rel=0.01)
    assert found["levels"]["0.05"]["seen"] < 55  # six deviations more
    assert found["levels"]["1e-06"]["seen"] == 0


def test_independent_models_and_the_marked_one_are_told_apart(bench, tmp_path, lora, monkeypatch):
    monkeypatch.setenv("MODELGROVE_HOME", "")  # put back at the end: the bench sets it
    world = bench.opened(tmp_path)
    assert bench.independent(world, [], quick=True)["most_bits"] < 92
    marked, report = world.run("editor.weight-mark", lora, key=world.keys["ours"])
    world.row("LoRA", "none", marked, report["change"]["relative"], None)
    assert world.rows[0]["as_it_is"] == 128
    console = Console(width=120, record=True)
    console.print(bench.table(world.rows))
    assert "128" in console.export_text()
    settings.cache_clear()


def test_scanners_are_compared_on_the_corpus_and_nothing_of_it_runs(bench):
    run = CliRunner().invoke(bench.main, ["scanners", "--quick", "--json"], catch_exceptions=False)
    found = json.loads(run.stdout)
    ours, alone = found["results"]["modelgrove"], found["results"]["torch weights_only alone"]
    assert (ours["calls"], ours["others"], ours["clean"], ours["wrong"]) == (found["calls"], found["others"], 0, 0)
    assert alone["others"] < found["others"]
