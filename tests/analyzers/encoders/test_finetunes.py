"""Which digits small full fine-tunes know, predicted from their weights by every encoder."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from made_loras import concept_factors, save_diffusers
from safetensors.torch import load_file, save_file

from modelgrove_analyzers.encoders.dense import Dense
from modelgrove_analyzers.encoders.gram_ridge import GramRidge
from modelgrove_analyzers.encoders.mvprobe import MVProbe
from modelgrove_analyzers.encoders.probex import ProbeX
from modelgrove_analyzers.encoders.statnn import StatNN
from modelgrove_analyzers.zoo.letters import DIGITS
from modelgrove_hub.errors import DataError
from modelgrove_hub.search.text import embed_texts
from modelgrove_hub.testing import FolderModel, run_plugin

TRAINED = {"rank": 16, "epochs": 60}
PLUGINS = {
    "gram-ridge": (GramRidge, {}),
    "mvprobe": (MVProbe, {**TRAINED, "learning_rate": 5e-3}),
    "probex": (ProbeX, TRAINED),
    "dense": (Dense, TRAINED),
    "statnn": (StatNN, {}),
}
TESTED = 10


@pytest.fixture(scope="module", params=PLUGINS)
def fitted(request, digits, tmp_path_factory):
    """The plugin, its expert's file and its report."""
    plugin, options = PLUGINS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    result = run_plugin(plugin(), digits[0][:-TESTED], folder / "job", options)
    return plugin(), folder / "job/out/expert.safetensors", result.report


def vectors_of(plugin, expert, models):
    return np.array([plugin.embed(expert, model) for model in models], np.float32)


def without_base(model):
    return FolderModel(model.paths["model.safetensors"].parent)


# What the others miss at this size is in bench/finetunes.py.
@pytest.mark.parametrize(("fitted", "least"), [("gram-ridge", 0.75), ("mvprobe", 0.65)], indirect=["fitted"])
def test_classes_of_new_models_are_predicted(fitted, least, digits, background):
    plugin, expert, report = fitted
    models, known = digits
    vectors = vectors_of(plugin, expert, models[-TESTED:])
    names = background.centre(embed_texts(DIGITS))
    right = (vectors @ names.T > 0) == [[name in own for name in DIGITS] for own in known[-TESTED:]]
    # Chance is .5 with a standard deviation of .05.
    assert right.mean() > least
    assert report["metrics"]["class_accuracy"] > least


@pytest.mark.parametrize("fitted", ["gram-ridge"], indirect=True)
def test_a_search_finds_models_that_know_a_digit(fitted, digits, background):
    plugin, expert, _ = fitted
    models, known = digits
    vectors = vectors_of(plugin, expert, models[-TESTED:])
    queries = background.centre(embed_texts([f"the digit {name}" for name in DIGITS]))
    best = background.scores(vectors, queries).argmax(0)
    assert sum(name in known[-TESTED:][row] for name, row in zip(DIGITS, best, strict=True)) >= 8


def test_the_report_and_the_file_say_what_was_learned(fitted, digits):
    plugin, expert, report = fitted
    documented = [model for model in digits[0][:-TESTED] if model.card]
    assert report["models"] == len(documented)
    assert set(report["left_aside"]) == {model.name for model in digits[0][:-TESTED]} - {m.name for m in documented}
    assert report["metrics"].keys() >= {"classes", "class_accuracy", "missed", "false_alarms"}
    assert report["metrics"]["classes"] == 10
    tensors = load_file(expert)
    assert tensors["labels"].shape == (10, 384)
    used = {layer.removesuffix(".T") for layer in report["layers"]}
    assert used <= {"hidden_0", "hidden_1"}
    assert {name for name in tensors if name.startswith("reference.")} == {f"reference.{layer}" for layer in used}


def test_a_vector_has_length_one_and_needs_no_base(fitted, digits):
    plugin, expert, _ = fitted
    model = digits[0][-1]
    one, two = vectors_of(plugin, expert, [model, without_base(model)])
    # float32 throughout.
    assert np.linalg.norm(one) == pytest.approx(1, abs=1e-5)
    assert (one == two).all()


@pytest.mark.parametrize("fitted", ["gram-ridge"], indirect=True)
def test_what_does_not_fit_is_refused(fitted, digits, tmp_path):
    plugin, expert, _ = fitted
    model = digits[0][-1]
    with pytest.raises(DataError, match="differs from what it is compared with by rounding at most"):
        plugin.embed(expert, model.base)
    weights = load_file(model.paths["model.safetensors"])
    save_file({**weights, "hidden.1.weight": weights["hidden.1.weight"][:100].clone()}, tmp_path / "small.safetensors")
    with pytest.raises(DataError, match=r"\(100, 128\), the expert knows \(128, 128\): it belongs to another base"):
        plugin.embed(expert, FolderModel(tmp_path / "small.safetensors"))
    weights["hidden.0.weight"][3, 3] = float("nan")
    save_file(weights, tmp_path / "nan.safetensors")
    with pytest.raises(DataError, match="hidden_0 of nan holds NaN or infinite values"):
        plugin.embed(expert, FolderModel(tmp_path / "nan.safetensors"))


def test_without_a_base_the_mean_is_the_reference(digits, background, tmp_path):
    models, known = digits
    run_plugin(GramRidge(), [without_base(model) for model in models[:-TESTED]], tmp_path / "job")
    vectors = vectors_of(GramRidge(), tmp_path / "job/out/expert.safetensors", models[-TESTED:])
    names = background.centre(embed_texts(DIGITS))
    right = (vectors @ names.T > 0) == [[name in own for name in DIGITS] for own in known[-TESTED:]]
    assert right.mean() > 0.7


def test_models_of_different_networks_are_refused(digits, tmp_path):
    strange = []
    for number in range(len(digits[0][:6])):
        folder = tmp_path / f"other-{number}"
        folder.mkdir()
        save_file(
            {f"layer{number}.weight": load_file(digits[0][0].paths["model.safetensors"])["head.weight"]},
            folder / "m.safetensors",
        )
        (folder / "README.md").write_text(f"---\ntags: [three, seven]\n---\nKnows the digit {DIGITS[number]}.\n")
        strange.append(FolderModel(folder))
    with pytest.raises(DataError, match="no matrices in common"):
        run_plugin(GramRidge(), strange, tmp_path / "job")


def test_a_text_head_is_trained_when_each_model_is_one_thing(digits, tmp_path):
    """Tags in no more combinations than there are tags: the labels are texts, as for LoRAs."""
    models = []
    for number, model in enumerate(digits[0][:24]):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, path in model.paths.items():
            if name.endswith("safetensors"):
                (folder / name).write_bytes(path.read_bytes())
        subject = ("cats", "horses", "trains")[number % 3]
        (folder / "README.md").write_text(f"---\ntags: [{subject}]\n---\nKnows {subject}.\n")
        models.append(FolderModel(folder, base=model.base))
    result = run_plugin(MVProbe(), models, tmp_path / "job", {"rank": 4, "epochs": 2})
    assert result.report["metrics"]["labels"] == 3
    assert "class_accuracy" not in result.report["metrics"]


def test_an_adapter_is_refused(fitted, tmp_path):
    plugin, expert, _ = fitted
    with pytest.raises(DataError, match="has none of the expert's layers, such as hidden_"):
        plugin.embed(expert, save_diffusers(tmp_path / "lora", concept_factors("red owl", 1)))


def test_a_hub_finds_fine_tunes_without_a_card_by_what_they_know(digits, tmp_path):
    run = partial(modelgrove, {"MODELGROVE_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"})
    run("init")
    run("ingest", digits[0][0].base.paths["README.md"].parent.parent)
    (row,) = [row for row in json.loads(run("expert", "ls", "--json")) if row["kind"] == "checkpoint"]
    assert row["models"] > 0.9 * len(digits[0])
    run("expert", "fit", "--tree", row["tree"], "--local")
    hits = json.loads(run("search", "the digit seven", "--by", "weights", "--limit", 8, "--json"))["hits"]
    known = dict(zip([f"local/{model.name}" for model in digits[0]], digits[1], strict=True))
    found = [hit["name"] for hit in hits]
    # Half of the models know it.
    assert sum("seven" in known[name] for name in found) >= 6
    assert any(name.startswith("local/untitled") for name in found)


def modelgrove(environment, *arguments):
    command = [str(Path(sys.executable).with_name("modelgrove")), *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
