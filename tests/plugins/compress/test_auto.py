"""Mixed precision on the shipped base: a size is kept, and less is lost than at the same bits everywhere."""

from importlib.resources import as_file, files

import pytest

from modelgrove_hub.errors import UsageError
from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_plugins.compress.auto import Auto
from modelgrove_plugins.compress.gptq import Gptq

VALUES = {"pictures": 4, "steps": 4}


@pytest.fixture(scope="module")
def base():
    with as_file(files("modelgrove_analyzers.zoo") / "data/zoo-base") as folder:
        yield FolderModel(folder, name="zoo-base", family="zoo")


def test_a_tenth_of_the_error_in_the_bytes_of_four_bits(base, tmp_path):
    plain = run_plugin(Gptq(), [base], tmp_path / "gptq", {**VALUES, "fidelity": True}).report
    values = {**VALUES, "size": str(plain["bytes_after"]), "probes": 8, "fidelity": True}
    mixed = run_plugin(Auto(), [base], tmp_path / "auto", values).report
    assert mixed["bytes_after"] <= plain["bytes_after"]
    assert mixed["fidelity"]["error"] < plain["fidelity"]["error"] / 10  # a hundredth, with more pictures and probes
    assert len({(layer["layout"], layer["bits"]) for layer in mixed["layers"]}) > 1
    assert sum(layer["sensitivity"] for layer in mixed["layers"]) == pytest.approx(mixed["expected_error"], rel=0.01)


def test_a_size_that_cannot_be_reached_is_refused(pipeline, tmp_path):
    with pytest.raises(UsageError, match="smallest forms"):
        run_plugin(Auto(), [pipeline], tmp_path, {**VALUES, "smallest": 256, "size": "2%", "probes": 1})


def test_a_size_above_the_original_has_nothing_to_do(pipeline, tmp_path):
    with pytest.raises(UsageError, match="nothing to quantize"):
        run_plugin(Auto(), [pipeline], tmp_path, {**VALUES, "size": "100%", "probes": 1})
