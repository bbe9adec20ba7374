import made_loras
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_loras import HELD_OUT, concept_factors, document, family, regauge, save_diffusers, save_kohya, save_peft
from safetensors.torch import load_file, save_file

from modelgrove_analyzers.encoders.deltas import read_model
from modelgrove_analyzers.encoders.features import common_layers, stacked
from modelgrove_analyzers.encoders.gram_ridge import GramOptions, GramRidge
from modelgrove_analyzers.encoders.grams import crossed, roots
from modelgrove_hub.errors import CorruptFileError, DataError, UsageError
from modelgrove_hub.search.text import embed_texts
from modelgrove_hub.testing import LocalContext, check_plugin, run_plugin

PAIRS = [f"{colour} {animal}" for colour in made_loras.COLOURS for animal in made_loras.ANIMALS]


def place(expert, model):
    return np.array(GramRidge().embed(expert[0], model), np.float32)


def ranking(vector, background):
    scores = background.scores(vector[None], background.centre(embed_texts([f"a {pair}" for pair in PAIRS])))[0]
    return [PAIRS[i] for i in np.argsort(-scores)]


def test_the_plugin_keeps_the_contract():
    assert [check for check in check_plugin(GramRidge()) if not check.ok] == []


def test_a_new_lora_of_a_known_concept_is_understood_without_its_card(expert, background, tmp_path):
    model = save_diffusers(tmp_path / "m", concept_factors("yellow owl", seed=9999, rank=7))
    vector = place(expert, model)
    # The vector is stored in float32 after float64 arithmetic.
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    assert ranking(vector, background)[0] == "yellow owl"


@pytest.mark.parametrize("pair", HELD_OUT)
def test_a_lora_of_a_concept_that_no_training_model_had_is_understood(expert, background, tmp_path, pair):
    model = save_diffusers(tmp_path / "m", concept_factors(pair, seed=7777, rank=3))
    assert pair in ranking(place(expert, model), background)[:3]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10_000), st.sampled_from([0.5, 8.0]), st.sampled_from([1, 2, 6]))
def test_gauge_convention_alpha_and_half_precision_do_not_move_a_model(expert, background, tmp_path, seed, alpha, rank):
    folder = tmp_path / f"{seed}-{alpha}-{rank}"
    factors = concept_factors(PAIRS[seed % len(PAIRS)], seed, rank)
    once = place(expert, save_diffusers(folder / "plain", factors))
    others = [
        save_diffusers(folder / "gauge", regauge(factors, seed)),
        save_diffusers(folder / "half", factors, half=True),
        save_peft(folder / "peft", regauge(factors, seed + 1), alpha),
        save_kohya(folder / "kohya", factors, alpha),
    ]
    for model in others:
        vector = place(expert, model)
        # Half precision keeps eleven bits of each factor: the direction moves by less than 0.5 %.
        assert float(vector @ once) > 0.9999
        assert ranking(vector, background)[:1] == ranking(once, background)[:1]


def test_strength_is_no_cue(expert, tmp_path):
    factors = concept_factors("green owl", seed=5)
    louder = {module: (down, 30 * up) for module, (down, up) in factors.items()}
    one, two = (place(expert, save_diffusers(tmp_path / n, f)) for n, f in (("a", factors), ("b", louder)))
    # Only rounding in float32 differs.
    np.testing.assert_allclose(one, two, atol=1e-4)


def test_a_training_model_is_placed_by_the_others(tmp_path, background):
    """A LoRA whose card lies is not believed by its own expert."""
    models = family(tmp_path / "models")
    liar = document(save_diffusers(tmp_path / "liar", concept_factors("yellow owl", seed=31)), "blue horse")
    run_plugin(GramRidge(), [*models, liar], tmp_path / "job")
    vector = np.array(GramRidge().embed(tmp_path / "job/out/expert.safetensors", liar), np.float32)
    places = ranking(vector, background)
    assert places.index("yellow owl") < places.index("blue horse")


def test_the_report_says_what_was_learned_and_what_was_left_aside(tmp_path, expert):
    report = expert[1]
    assert report["models"] == 26
    assert len(report["layers"]) == len(made_loras.MODULES)
    assert report["metrics"]["top1_known"] >= 0.8
    assert set(report["metrics"]) >= {"top1_unknown", "labels", "regulariser", "missed", "false_alarms"}
    models = family(tmp_path, each=1)
    broken = concept_factors("red owl", 1)
    broken[made_loras.MODULES[0]][1][0, 0] = float("nan")
    bad = document(save_diffusers(tmp_path / "bad", broken), "red owl")
    bare = save_diffusers(tmp_path / "bare", concept_factors("red owl", 2))
    result = run_plugin(GramRidge(), [*models, bad, bare], tmp_path / "job")
    assert result.report["models"] == len(models)
    assert "NaN" in result.report["left_aside"]["bad"]
    assert "no card" in result.report["left_aside"]["bare"]


def test_too_few_documented_models_are_refused(tmp_path):
    models = [save_diffusers(tmp_path / str(i), concept_factors("red owl", i)) for i in range(9)]
    with LocalContext(tmp_path / "job", models) as context, pytest.raises(UsageError, match=r"0 of 9 .* 8 are needed"):
        GramRidge().run(context, GramOptions())


def test_models_of_one_label_only_are_refused(tmp_path):
    models = [document(save_diffusers(tmp_path / str(i), concept_factors("owl", i)), "owl") for i in range(9)]
    with LocalContext(tmp_path / "job", models) as context, pytest.raises(UsageError, match="9 models with 1 labels"):
        GramRidge().run(context, GramOptions())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda up: up.fill_(float("inf")), "NaN or infinite"),
        (lambda up: up.zero_(), "changes nothing"),
    ],
)
def test_weights_that_say_nothing_are_refused(expert, tmp_path, change, reason):
    factors = concept_factors("red owl", 1)
    for _, up in factors.values():
        change(up)
    with pytest.raises(DataError, match=reason):
        place(expert, save_diffusers(tmp_path / "m", factors))


def test_a_lora_of_another_base_is_refused(expert, tmp_path):
    other = {module: (down, up[:40]) for module, (down, up) in concept_factors("red owl", 1).items()}
    with pytest.raises(DataError, match=r"has shape \(40, 32\), the expert knows \(48, 32\)"):
        place(expert, save_diffusers(tmp_path / "m", other))
    renamed = {f"mid_block.{module}": pair for module, pair in concept_factors("red owl", 1).items()}
    with pytest.raises(DataError, match="changes none of the expert's layers, such as down_blocks"):
        place(expert, save_diffusers(tmp_path / "n", renamed))


def test_a_model_with_half_of_the_layers_is_still_understood(expert, background, tmp_path):
    factors = concept_factors("yellow owl", seed=4321)
    some = dict(list(factors.items())[::2])
    assert ranking(place(expert, save_diffusers(tmp_path / "m", some)), background)[0] == "yellow owl"


def test_an_expert_file_that_is_none_is_refused(tmp_path, expert):
    model = save_diffusers(tmp_path / "m", concept_factors("red owl", 1))
    for name, tensors, metadata in (
        ("a", {"x": torch.zeros(1)}, None),
        ("b", {"x": torch.zeros(1)}, {"modelgrove.expert": "[]"}),
        ("c", load_file(expert[0]), {"modelgrove.expert": '{"format": "gram-ridge 0"}'}),
        (
            "d",
            {"x": torch.zeros(1)},
            {"modelgrove.expert": '{"format": "gram-ridge 2", "columns": 4, "shapes": {"l": 3}}'},
        ),
        (
            "e",
            {"x": torch.zeros(1)},
            {"modelgrove.expert": '{"format": "gram-ridge 2", "columns": 4, "shapes": {"l": [3, 2]}}'},
        ),
    ):
        save_file(tensors, tmp_path / name, metadata)
        with pytest.raises(CorruptFileError, match=str(tmp_path / name)):
            GramRidge().embed(tmp_path / name, model)


def test_the_kernel_is_the_inner_product_of_square_roots_of_grams(tmp_path):
    pairs = [concept_factors("red owl", 1, rank=3), concept_factors("blue fish", 2, rank=5)]
    models = [read_model(save_diffusers(tmp_path / str(i), f), None, 8) for i, f in enumerate(pairs)]
    for module, updates in stacked(models, common_layers(models)).items():
        found = crossed(roots(updates), roots(updates))
        expected = []
        for factors in pairs:
            down, up = next(pair for name, pair in factors.items() if name.replace(".", "_") == module)
            X = up.double() @ down.double()
            values, vectors = torch.linalg.eigh(X @ X.T)
            half = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
            expected.append(half / half.norm())
        wanted = torch.tensor([[float((a * b).sum()) for b in expected] for a in expected])
        # float32 products of float32 factors against float64.
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_fitting_again_gives_the_same_numbers(tmp_path):
    models = family(tmp_path / "models", each=1)
    for job in ("one", "two"):
        run_plugin(GramRidge(), models, tmp_path / job)
    one, two = ((tmp_path / job / "out/expert.safetensors").read_bytes() for job in ("one", "two"))
    assert one == two
