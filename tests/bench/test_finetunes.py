import json
import subprocess
import sys
from pathlib import Path

from modelgrove_analyzers.zoo.classifiers import Schedule
from modelgrove_analyzers.zoo.digits import BaseRecipe, Nuisance, digits_population, grow_digits

BENCH = Path(__file__).parents[2] / "bench/finetunes.py"


def test_the_quick_bench_tells_which_digits_models_know(tmp_path):
    base = BaseRecipe(pictures=1500, schedule=Schedule(2e-3, 0.01, 200))
    grow_digits(digits_population(70, nuisance=Nuisance(steps=(60, 90))), tmp_path, base)
    encoders = [option for name in ("gram-ridge", "statnn") for option in ("--encoder", name)]
    command = [sys.executable, str(BENCH), str(tmp_path), "--quick", "--json", *encoders]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)["encoders"]
    ((ridge,), (statistics,)) = found["gram-ridge"], found["statnn"]
    assert (ridge["train"], ridge["test"]) == (56, 14)
    # Chance is .5 with a standard deviation of .04.
    assert ridge["accuracy"] > 0.75
    assert ridge["map"] > statistics["map"]
    assert ridge.keys() == statistics.keys() >= {"accuracy", "p5", "map", "digit_map", "fit_s", "embed_ms"}
