"""LCSC on tiny pipelines and LoRAs: an evaluator that knows the best weights, and the real ones."""

import json
import math
import shutil
from itertools import product
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from modelgrove_hub.contracts import API, Kind, Params, Result
from modelgrove_hub.errors import DataError, NotFoundError, PluginError, UsageError
from modelgrove_hub.plugins import check_params, get_plugin
from modelgrove_hub.recipes import recipe_of
from modelgrove_hub.search.text import WIDTH
from modelgrove_hub.testing import FolderModel, check_plugin, run_plugin
from modelgrove_plugins.evaluate import states as live_states
from modelgrove_plugins.merge import lcsc
from modelgrove_plugins.merge.lcsc import Lcsc
from modelgrove_plugins.merge.sum import Sum

FILE = "unet/diffusion_pytorch_model.safetensors"
OPTIMUM = (-0.8, 0.5, 1.3)
ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0"
SHAPES = {f"{ATTENTION}.attn1.to_q": (32, 32), f"{ATTENTION}.attn2.to_k": (32, WIDTH)}
FEW = {"candidates": 24, "population": 4, "seed": 1}
COUNT = 6


class Known:
    """Scores by the distance of the live weights from known ones."""

    name, kind, api = "known", Kind.ANALYZER, API
    summary, paper = "The distance from known weights.", ""
    Params = Params
    wanted: ClassVar[dict[str, torch.Tensor]] = {}
    given: ClassVar[list[tuple[list[str], int]]] = []
    answer = None

    def run(self, context, params):
        return Result()

    def prepare(self, pipeline, pictures, seed, params):
        self.given.append(([picture.name for picture in pictures], seed))

        def score():
            if self.answer is not None:
                return self.answer
            found = dict(pipeline.network.named_parameters())
            return sum(float((found[name] - weight).square().sum()) for name, weight in self.wanted.items())

        return score


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(lcsc, "get_plugin", lambda name: Known if name == "analyzer.known" else get_plugin(name))
    monkeypatch.setattr(Known, "given", [])
    monkeypatch.setattr(Known, "wanted", {})
    return Known


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    dice = np.random.default_rng(0)
    for number in range(COUNT):
        Image.fromarray(dice.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}", "utf-8")
    return folder


@pytest.fixture(scope="module")
def checkpoints(pipeline, tmp_path_factory):
    """Three states: the tiny pipeline with changed weights of the denoiser, in float16 as it is."""
    models = []
    for number in range(3):
        folder = tmp_path_factory.mktemp("states") / f"step-{number}"
        for path, file in pipeline.files().items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / path)
        generator = torch.Generator().manual_seed(number)
        changed = {
            name: (weight.float() + 0.02 * torch.randn(weight.shape, generator=generator)).half()
            for name, weight in load_file(folder / FILE).items()
        }
        save_file(changed, folder / FILE, {"format": "pt"})
        models.append(FolderModel(folder, name=f"step-{number}", family="zoo"))
    return models


@pytest.fixture
def loras(make):
    return [make(f"step-{number}", 4, seed=number, shapes=SHAPES) for number in range(3)]


def combined(values):
    return sum(weight * value.double() for weight, value in zip(OPTIMUM, values, strict=True))


def weights_of(model):
    return load_file(model.files()[FILE])


def trail_of(folder):
    return json.loads((folder / "out" / lcsc.TRAIL).read_text("utf-8"))


def merge(models, folder, pictures, **params):
    return run_plugin(Lcsc(), models, folder, {"pictures": str(pictures), **FEW, **params})


def test_checkpoints_a_planted_combination_is_found_and_written(checkpoints, pictures, known, tmp_path):
    states = [weights_of(model) for model in checkpoints]
    known.wanted = {name: combined([state[name] for state in states]).float() for name in states[0]}
    result = merge(checkpoints, tmp_path / "job", pictures, evaluator="known", candidates=120, population=12)
    search = result.report["search"]
    begun = min(search["best_single"]["score"], search["best_average"]["score"])
    assert search["winner"]["score"] < 0.05 * begun
    assert search["winner"]["coefficients"][0] < -0.5
    # The file holds the exact combination by the recipe's coefficients, rounded once.
    recipe = recipe_of(FolderModel(tmp_path / "job/out").metadata(), "found")
    alpha = [model.weight for model in recipe.models]
    assert math.fsum(alpha) == pytest.approx(1, abs=1e-12)
    assert alpha in [one["coefficients"] for one in trail_of(tmp_path / "job")["scored_again"]]
    found = load_file(tmp_path / "job/out" / FILE)
    for name, weight in found.items():
        exact = sum(share * state[name].double() for share, state in zip(alpha, states, strict=True))
        # Half of float16's spacing is 2^-11 of the value; float32 noise may tip a tie.
        assert bool(((weight.double() - exact).abs() <= 2**-10.9 * exact.abs() + 1e-6).all()), name


def test_the_recipe_makes_the_same_bytes_without_pictures(checkpoints, pictures, known, tmp_path):
    merge(checkpoints, tmp_path / "job", pictures, evaluator="known")
    recipe = recipe_of(FolderModel(tmp_path / "job/out").metadata(), "found")
    assert recipe.method == "sum"
    run_plugin(Sum(), checkpoints, tmp_path / "again", recipe.params())
    paths = list(FolderModel(tmp_path / "again/out").files())
    assert FILE in paths
    for path in paths:
        assert (tmp_path / "again/out" / path).read_bytes() == (tmp_path / "job/out" / path).read_bytes(), path


def test_what_the_states_share_is_kept_bit_by_bit(checkpoints, pictures, known, tmp_path):
    merge(checkpoints, tmp_path / "job", pictures, evaluator="known")
    before = load_file(checkpoints[0].files()["codec/codec.safetensors"])
    after = load_file(tmp_path / "job/out/codec/codec.safetensors")
    assert all(torch.equal(values, after[name]) for name, values in before.items())


def test_loras_a_planted_combination_is_found_and_exact(loras, pipeline, pictures, known, tmp_path):
    models, updates = [model for model, _ in loras], [exact for _, exact in loras]
    before = weights_of(pipeline)
    known.wanted = {
        f"{name}.weight": (before[f"{name}.weight"].double() + combined([one[name] for one in updates])).float()
        for name in SHAPES
    }
    more = {"evaluator": "known", "candidates": 120, "population": 12}
    baked = merge([*models, pipeline], tmp_path / "baked", pictures, base=True, **more)
    based = [FolderModel(next(iter(m.paths.values())), name=m.name, adapter_type="lora", base=pipeline) for m in models]
    joined = merge(based, tmp_path / "joined", pictures, **more)
    assert joined.report["search"] == baked.report["search"]
    assert joined.report["search"]["winner"]["score"] < 0.05 * joined.report["search"]["best_average"]["score"]
    alpha = [model.weight for model in recipe_of(FolderModel(tmp_path / "joined/out").metadata(), "found").models]
    assert min(alpha) < -0.5
    tensors = load_file(tmp_path / "joined/out/pytorch_lora_weights.safetensors")
    for name in SHAPES:
        exact = sum(share * one[name] for share, one in zip(alpha, updates, strict=True))
        up, down = (tensors[f"unet.{name}.lora_{side}.weight"].double() for side in "BA")
        # Two QRs and an SVD in float32.
        assert float((up @ down - exact).norm() / exact.norm()) < 1e-5


def test_a_combination_in_the_network_is_what_sum_writes(checkpoints, loras, pipeline, tmp_path, local):
    adapters = [model for model, _ in loras]
    for models, base in ((checkpoints, None), (adapters, pipeline)):
        with local([*models, *([base] if base else [])]) as context:
            found = live_states.States(context, models, base)
            found.set(OPTIMUM)
            found.set((0.0, 0.0, 1.0))
            found.set(OPTIMUM)  # nothing of what was set before is left
        live = dict(found.live.network.named_parameters())
        inputs, params = [*models, *([base] if base else [])], {"weights": OPTIMUM, "base": base is not None}
        run_plugin(Sum(), inputs, tmp_path / f"sum-{base is None}", params)
        for name, weight in load_file(tmp_path / f"sum-{base is None}" / "out" / FILE).items():
            # The file is rounded to float16; ties of float32 noise.
            wanted = weight.double()
            assert bool(((live[name].double() - wanted).abs() <= 2**-10.9 * wanted.abs() + 1e-6).all()), name


@pytest.fixture
def local(tmp_path):
    from modelgrove_hub.testing import LocalContext

    numbers = iter(range(9))
    return lambda inputs: LocalContext(tmp_path / f"context-{next(numbers)}", inputs)


@pytest.mark.parametrize("kind", ["checkpoints", "adapters"])
def test_states_that_do_not_fit_into_memory_are_read_again(kind, checkpoints, loras, pipeline, local, monkeypatch):
    models, base = (checkpoints, None) if kind == "checkpoints" else ([model for model, _ in loras], pipeline)
    found = []
    for most in (live_states.MOST, 0):
        monkeypatch.setattr(live_states, "MOST", most)
        with local(models) as context:
            states = live_states.States(context, models, base)
            states.set(OPTIMUM)
            found.append({name: weight.clone() for name, weight in states.live.network.named_parameters()})
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())


def test_a_seed_gives_the_same_files_and_another_one_others(checkpoints, pictures, known, tmp_path):
    known.wanted = {"conv_in.weight": combined([weights_of(model)["conv_in.weight"] for model in checkpoints]).float()}
    for name, seed in (("one", 5), ("same", 5), ("other", 6)):
        merge(checkpoints, tmp_path / name, pictures, evaluator="known", candidates=12, seed=seed)
    for path in (FILE, lcsc.TRAIL):
        one, same = ((tmp_path / name / "out" / path).read_bytes() for name in ("one", "same"))
        assert one == same
    first, other = trail_of(tmp_path / "one"), trail_of(tmp_path / "other")
    assert first["candidates"][-1]["coefficients"] != other["candidates"][-1]["coefficients"]


def test_every_candidate_is_kept_with_its_score(checkpoints, pictures, known, tmp_path):
    states = [weights_of(model) for model in checkpoints]
    name = "conv_in.weight"
    known.wanted = {name: combined([state[name] for state in states]).float()}
    result = merge(checkpoints, tmp_path / "job", pictures, evaluator="known")
    assert result.artefacts == (lcsc.TRAIL,)
    trail = trail_of(tmp_path / "job")
    assert len(trail["candidates"]) == FEW["candidates"] == result.report["search"]["candidates"]
    assert trail["states"] == [model.name for model in checkpoints]
    for one in trail["candidates"]:
        exact = sum(a * state[name].double() for a, state in zip(one["coefficients"], states, strict=True))
        # float32 against float64.
        assert one["score"] == pytest.approx(float((exact - known.wanted[name]).square().sum()), rel=1e-4, abs=1e-8)
    ranked = sorted(trail["candidates"], key=lambda one: one["score"])
    again = [one["coefficients"] for one in trail["scored_again"]]
    assert again[:5] == [one["coefficients"] for one in ranked[:5]]
    assert {"single", "average"} <= {one["origin"] for one in trail["scored_again"]}


def test_the_best_are_scored_again_on_other_pictures_and_noise(checkpoints, pictures, known, tmp_path):
    merge(checkpoints, tmp_path / "job", pictures, evaluator="known")
    (searched, one), (held_back, other) = known.given
    assert len(searched) == len(held_back) == COUNT / 2
    assert not set(searched) & set(held_back)
    assert one != other
    trail = trail_of(tmp_path / "job")
    assert (trail["searched_on"], trail["held_back"]) == (searched, held_back)


def test_the_winner_is_the_best_of_the_second_look(checkpoints, pictures, known, tmp_path, monkeypatch):
    """On the second half the first state alone is best, whatever the search found."""
    states = [weights_of(model)["conv_in.weight"].float() for model in checkpoints]
    aims = iter((states[2], states[0]))

    def prepare(self, pipeline, pictures, seed, params):
        aim = next(aims)
        return lambda: float((dict(pipeline.network.named_parameters())["conv_in.weight"] - aim).square().sum())

    monkeypatch.setattr(Known, "prepare", prepare)
    result = merge(checkpoints, tmp_path / "job", pictures, evaluator="known")
    again = trail_of(tmp_path / "job")["scored_again"]
    lowest = min(again, key=lambda one: one["score"])
    assert [model.weight for model in recipe_of(FolderModel(tmp_path / "job/out").metadata(), "x").models] == lowest[
        "coefficients"
    ]
    assert lowest["origin"] == result.report["search"]["winner"]["origin"]
    # The search itself ends at the third state.
    assert result.report["search"]["best_single"]["coefficients"] == [0, 0, 1]


@pytest.mark.parametrize("evaluator", ["denoising-loss", "frechet"])
def test_the_real_evaluators_lower_their_scores(evaluator, checkpoints, pictures, tmp_path):
    scoring = ["times=2"] if evaluator == "denoising-loss" else ["steps=1"]
    result = merge(checkpoints, tmp_path / "job", pictures, evaluator=evaluator, scoring=scoring, candidates=12)
    search = result.report["search"]
    assert search["winner"]["score_held_back"] <= search["best_average"]["score_held_back"]
    scores = [one["score"] for one in trail_of(tmp_path / "job")["candidates"]]
    assert len(set(scores)) == len(scores)


def test_it_keeps_the_contract(checkpoints, pictures):
    params = {"pictures": str(pictures), **FEW, "candidates": 9, "scoring": ["times=1"]}
    checks = check_plugin(Lcsc, inputs=checkpoints, params=params)
    # The kit takes the target of a symbolic link for written; the pipeline's folder is laid out with links.
    assert [check for check in checks if not check.ok and check.name != "writes only into its output folder"] == []
    assert get_plugin("merger.lcsc") is Lcsc


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"weights": [1, 1, 1]}, "finds the weights itself"),
        ({"blocks": ["down_blocks=0"]}, "finds the weights itself"),
        ({"rank": 4}, "checkpoints keep their shapes"),
        ({"candidates": 8}, "allow more than 8"),
        ({"scoring": ["times"]}, "NAME=VALUE"),
        ({"scoring": ["time=4"]}, "no parameter 'time'"),
        ({"scoring": ["seed=4"]}, "'seed=4' is an option of lcsc itself"),
        ({"evaluator": "copies"}, "cannot score a model in memory"),
        ({"evaluator": "nobody"}, r"analyzer\.nobody"),
    ],
)
def test_wrong_parameters_are_refused(params, match, checkpoints, pictures, tmp_path):
    with pytest.raises(UsageError, match=match):
        merge(checkpoints, tmp_path / "job", pictures, **params)
    assert not list((tmp_path / "job").rglob("*.safetensors"))


def test_pictures_are_needed():
    with pytest.raises(UsageError, match="parameter 'pictures' is needed"):
        check_params(Lcsc, {})


def test_models_that_are_no_training_are_refused(checkpoints, loras, make, pipeline, pictures, known, tmp_path):
    model = loras[0][0]
    other, _ = make("other", 4, shapes={f"{ATTENTION}.attn1.to_q": (32, 32)})
    stranger, _ = make("stranger", 4, shapes={"nowhere.to_q": (32, 32)})
    cases = [
        ([checkpoints[0]], {}, "name two or more"),
        ([checkpoints[0], model], {}, "states of one training are alike"),
        ([*checkpoints, pipeline], {"base": True}, "leave tiny-zoo away"),
        ([model, loras[1][0]], {}, "give it with --base"),
        ([model, other, pipeline], {"base": True}, r"other has no module .*attn2\.to_k"),
        ([stranger, stranger, pipeline], {"base": True}, "nowhere.to_q is none of the unet"),
    ]
    for number, (models, params, match) in enumerate(cases):
        with pytest.raises(UsageError, match=match):
            merge(models, tmp_path / f"job-{number}", pictures, evaluator="known", **params)
        assert not list((tmp_path / f"job-{number}").rglob("*.safetensors"))


def test_only_the_denoiser_may_differ(checkpoints, pictures, known, tmp_path):
    folder = tmp_path / "other"
    for path, file in checkpoints[1].files().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / path)
    codec = load_file(folder / "codec/codec.safetensors")
    save_file({**codec, "mean": codec["mean"] + 1}, folder / "codec/codec.safetensors")
    with pytest.raises(UsageError, match="tensor codec/mean of other"):
        merge([checkpoints[0], FolderModel(folder, name="other")], tmp_path / "job", pictures, evaluator="known")


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_the_evaluator_s_fault(score, checkpoints, pictures, known, tmp_path, monkeypatch):
    monkeypatch.setattr(Known, "answer", score)
    with pytest.raises(PluginError, match=r"analyzer\.known scored (nan|inf)"):
        merge(checkpoints, tmp_path / "job", pictures, evaluator="known")
    assert not list((tmp_path / "job").rglob("*.safetensors"))


def test_a_nan_in_a_state_is_refused_by_name(checkpoints, pictures, known, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoints[0].files()["model_index.json"].parent, folder)
    weights = load_file(folder / FILE)
    weights["conv_in.bias"][0] = math.nan
    save_file(weights, folder / FILE)
    with pytest.raises(DataError, match=r"unet/conv_in\.bias"):
        merge([FolderModel(folder, name="broken"), *checkpoints], tmp_path / "job", pictures, evaluator="known")


def test_pictures_that_are_too_few_or_missing_are_refused(checkpoints, pictures, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for number, suffix in product(range(3), ("png", "txt")):
        shutil.copyfile(pictures / f"{number}.{suffix}", few / f"{number}.{suffix}")
    with pytest.raises(UsageError, match="3 pictures are too few"):
        merge(checkpoints, tmp_path / "one", few)
    with pytest.raises(NotFoundError, match="no such folder"):
        merge(checkpoints, tmp_path / "two", tmp_path / "nowhere")
