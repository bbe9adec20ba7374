"""What all encoders promise, each fitted on the same made-up LoRAs."""

import numpy as np
import pytest
from made_loras import MODULES, concept_factors, document, family, regauge, save_diffusers, save_kohya
from safetensors.torch import load_file

from modelgrove_analyzers.encoders.dense import Dense
from modelgrove_analyzers.encoders.gram_ridge import GramRidge
from modelgrove_analyzers.encoders.mvprobe import MVProbe
from modelgrove_analyzers.encoders.probex import ProbeX
from modelgrove_analyzers.encoders.statnn import StatNN
from modelgrove_hub.errors import CorruptFileError, DataError
from modelgrove_hub.search.text import embed_texts
from modelgrove_hub.testing import LocalContext, check_plugin, run_plugin

TRAINED = {"rank": 16, "epochs": 20}
PLUGINS = {
    "gram-ridge": (GramRidge, {}),
    "probex": (ProbeX, {**TRAINED, "temperature": True}),
    "mvprobe": (MVProbe, {**TRAINED, "learning_rate": 2e-3}),
    "dense": (Dense, TRAINED),
    "statnn": (StatNN, {}),
}


@pytest.fixture(scope="module", params=PLUGINS)
def fitted(request, tmp_path_factory):
    """The plugin, its expert's file and its report."""
    plugin, options = PLUGINS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    result = run_plugin(plugin(), family(folder / "models", each=3), folder / "job", options)
    return plugin(), folder / "job/out/expert.safetensors", result.report


def test_the_plugin_keeps_the_contract(fitted):
    assert [check for check in check_plugin(fitted[0]) if not check.ok] == []


def test_a_vector_has_length_one_and_depends_on_the_update_alone(fitted, tmp_path):
    plugin, expert, _ = fitted
    factors = concept_factors("yellow owl", seed=77)
    models = (
        save_diffusers(tmp_path / "plain", factors),
        save_diffusers(tmp_path / "gauge", regauge(factors, 5)),
        save_kohya(tmp_path / "kohya", factors, alpha=8.0),
    )
    vectors = [np.array(plugin.embed(expert, model), np.float32) for model in models]
    assert vectors[0].shape == (384,)
    for vector in vectors:
        # float32 throughout; alpha and gauge cost a rounding of each factor.
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(vector, vectors[0], atol=1e-4)


# The made-up words differ by output direction alone, behind a random A: dense and statnn cannot see that.
@pytest.mark.parametrize("fitted", ["gram-ridge", "probex", "mvprobe"], indirect=True)
def test_new_loras_of_known_concepts_are_understood(fitted, background, tmp_path):
    plugin, expert, _ = fitted
    texts = ["a red horse", "a yellow owl", "a green cat", "a blue owl"]
    queries = background.centre(embed_texts(texts))
    places = []
    for number, text in enumerate(texts):
        model = save_diffusers(tmp_path / str(number), concept_factors(text[2:], seed=9000 + number))
        scores = background.scores(np.array([plugin.embed(expert, model)], np.float32), queries)[0]
        places.append(int((scores >= scores[number]).sum()))
    assert places.count(1) >= 3


def test_the_report_and_the_file_say_what_was_learned(fitted):
    plugin, expert, report = fitted
    assert report["models"] == 39
    layers = {module.replace(".", "_") for module in MODULES}
    assert set(report["layers"]) <= layers
    assert len(report["layers"]) == (1 if hasattr(plugin, "encoder") else len(layers))
    assert {"top1_known", "missed", "false_alarms"} <= report["metrics"].keys()
    labels = load_file(expert)["labels"].numpy()
    assert labels.shape == (report["metrics"]["labels"], 384)
    np.testing.assert_allclose(np.linalg.norm(labels, axis=1), 1, atol=1e-5)


def test_what_does_not_fit_is_refused(fitted, tmp_path):
    plugin, expert, _ = fitted
    other = {module: (down, up[:40]) for module, (down, up) in concept_factors("red owl", 1).items()}
    with pytest.raises(DataError, match="another base model"):
        plugin.embed(expert, save_diffusers(tmp_path / "other", other))
    strange = next(other for other, _ in PLUGINS.values() if other is not type(plugin))
    with pytest.raises(CorruptFileError, match="fit it again"):
        strange().embed(expert, save_diffusers(tmp_path / "m", concept_factors("red owl", 1)))


def test_the_same_job_gives_the_same_expert(tmp_path):
    models = family(tmp_path / "models", each=2)
    for job in ("one", "two"):
        run_plugin(ProbeX(), models, tmp_path / job, {"rank": 8, "epochs": 2}, seed=3)
    one, two = ((tmp_path / job / "out/expert.safetensors").read_bytes() for job in ("one", "two"))
    assert one == two


def test_a_cancelled_training_stops(tmp_path):
    from modelgrove_hub.contracts import Cancelled

    models = [
        document(save_diffusers(tmp_path / t, concept_factors(t, i)), t)
        for i, t in enumerate(
            f"{colour} {animal}" for colour in ("red", "blue", "green") for animal in ("cat", "owl", "horse")
        )
    ]
    with LocalContext(tmp_path / "job", models, cancel_after=25) as context, pytest.raises(Cancelled):
        ProbeX().run(context, ProbeX.Params(rank=4, epochs=1000))
    assert any("epoch" in message for _, message in context.steps)
