import json

from click.testing import CliRunner

from modelgrove_analyzers.zoo.classifiers import Schedule
from modelgrove_analyzers.zoo.digits import BaseRecipe, Nuisance, digits_population, grow_digits


def test_the_quick_bench_tells_which_digits_models_know(bench, tmp_path):
    base = BaseRecipe(pictures=1500, schedule=Schedule(2e-3, 0.01, 200))
    grow_digits(digits_population(70, nuisance=Nuisance(steps=(60, 90))), tmp_path, base)
    encoders = [option for name in ("gram-ridge", "statnn") for option in ("--encoder", name)]
    arguments = [str(tmp_path), "--quick", "--json", *encoders]
    found = json.loads(CliRunner().invoke(bench.main, arguments, catch_exceptions=False).stdout)["encoders"]
    ((ridge,), (statistics,)) = found["gram-ridge"], found["statnn"]
    assert (ridge["train"], ridge["test"]) == (56, 14)
    # Chance is .5 with a standard deviation of .04.
    assert ridge["accuracy"] > 0.75
    assert ridge["map"] > statistics["map"]
    assert ridge.keys() == statistics.keys() >= {"accuracy", "p5", "map", "digit_map", "fit_s", "embed_ms"}
