import json

import pytest
from click.testing import CliRunner

from modelgrove_analyzers.zoo.cli import zoo

ENCODER = "gram-ridge --no-ask"


def run(bench, *options):
    arguments = ["--quick", "--json", "--encoder", ENCODER, *options]
    done = CliRunner().invoke(bench.main, arguments, catch_exceptions=False)
    return {name: rows[0] for name, rows in json.loads(done.stdout)["encoders"][ENCODER].items()}


@pytest.fixture
def grown(tmp_path):
    """Folders of one barely trained LoHa and DoRA."""
    for method in ("loha", "dora"):
        options = ["--type", method, "--concept", "cat", "--models", "1", "--steps", "1", "1"]
        CliRunner().invoke(zoo, ["grow", str(tmp_path / method), *options], catch_exceptions=False)
    return tmp_path


def test_other_recipes_are_measured_beside_the_one_that_was_learned(bench, grown):
    found = run(bench, "--also", str(grown / "loha"), "--also", str(grown / "dora"))
    assert [*found] == [
        "rank 4",
        "rank 2",
        "rank 8",
        "rank 16",
        "bfloat16",
        "8-bit",
        "merged",
        "loha → ΔW",
        "dora → ΔW",
    ]
    assert found["loha → ΔW"]["test"] == found["dora → ΔW"]["test"] == 1
    # Copies of less precision are the same models to an encoder: at most one of a handful may change sides.
    for copies in ("bfloat16", "8-bit"):
        assert abs(found[copies]["in_dist"] - found["rank 4"]["in_dist"]) <= 1 / 4


def test_an_artist_is_left_out(bench):
    found = run(bench, "--artist-out", "noto")
    assert [*found] == ["others", "noto", "noto, others"]
    assert found["noto"]["train"] > 8
