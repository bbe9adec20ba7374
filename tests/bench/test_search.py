import json
from pathlib import Path

from click.testing import CliRunner

import modelgrove_analyzers.zoo

SAMPLE = Path(modelgrove_analyzers.zoo.__file__).parent / "data/sample"


def test_the_quick_bench_finds_what_the_shipped_sample_shows(bench):
    arguments = [str(SAMPLE), "--quick", "--json", "--encoder", "gram-ridge --no-ask", "--encoder", "statnn"]
    found = json.loads(CliRunner().invoke(bench.main, arguments, catch_exceptions=False).stdout)["encoders"]
    ((ridge,), (statistics,)) = found["gram-ridge --no-ask"], found["statnn"]
    assert ridge["train"] + ridge["test"] == len((SAMPLE / "truth.jsonl").read_text().splitlines())
    # One of about forty concepts by chance.
    assert ridge["in_dist"] > 0.5
    assert ridge["map_known"] > statistics["map_known"]
    assert ridge.keys() == statistics.keys() >= {"generalised", "p1", "p5", "map", "knn", "fit_s", "embed_ms"}
