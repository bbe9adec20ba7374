import json
import subprocess
import sys
from pathlib import Path

import modelgrove_analyzers.zoo

BENCH = Path(__file__).parents[2] / "bench/search.py"
SAMPLE = Path(modelgrove_analyzers.zoo.__file__).parent / "data/sample"


def test_the_quick_bench_finds_what_the_shipped_sample_shows():
    command = [
        sys.executable,
        str(BENCH),
        str(SAMPLE),
        "--quick",
        "--json",
        "--encoder",
        "gram-ridge",
        "--encoder",
        "statnn",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)["encoders"]
    ((ridge,), (statistics,)) = found["gram-ridge"], found["statnn"]
    assert ridge["train"] + ridge["test"] == len((SAMPLE / "truth.jsonl").read_text().splitlines())
    # One of about forty concepts by chance.
    assert ridge["in_dist"] > 0.5
    assert ridge["map_known"] > statistics["map_known"]
    assert ridge.keys() == statistics.keys() >= {"generalised", "p1", "p5", "map", "knn", "fit_s", "embed_ms"}
