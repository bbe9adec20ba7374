"""MuseumMaker on the tiny pipeline: a chain of three styles, what changes in each training and what may not."""

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from modelgrove_hub.errors import DataError, NotFoundError, UsageError
from modelgrove_hub.formats.adapters import read_adapter
from modelgrove_hub.formats.listing import list_model
from modelgrove_hub.formats.recognise import recognise
from modelgrove_hub.formats.style_tokens import FILE, KEY, PREFIX, hash_of, place_rows, read_museum, split_prompt
from modelgrove_hub.registry.digest import digest_of
from modelgrove_hub.search.text import WIDTH
from modelgrove_hub.tables import ModelKind, Relation
from modelgrove_hub.testing import FolderModel, LocalContext, check_plugin, run_plugin
from modelgrove_plugins.evaluate.pictures import read_pictures
from modelgrove_plugins.merge import museum
from modelgrove_plugins.merge.museum import MuseumMaker, MuseumParams
from modelgrove_plugins.merge.style_training import Training, restyled
from modelgrove_plugins.merge.sum import Sum
from modelgrove_plugins.preview.diffusers import PICTURE, DiffusersPreviewer, PreviewParams, open_painter

LORA = "pytorch_lora_weights.safetensors"
FEW = {"steps": 3, "batch": 2, "rank": None, "learning_rate": 0.02}


def paint_pictures(folder, seed):
    folder.mkdir()
    dice = np.random.default_rng(seed)
    for number in range(3):
        Image.fromarray(dice.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{number}.png")
    (folder / "0.txt").write_text("a cat", "utf-8")
    return folder


@pytest.fixture(scope="module")
def styles(tmp_path_factory):
    root = tmp_path_factory.mktemp("styles")
    return {name: paint_pictures(root / name, seed) for seed, name in enumerate(("monet", "klee", "miro"))}


@pytest.fixture(scope="module")
def learn(pipeline, styles):
    def run(folder, token, earlier=None, **params):
        inputs = [pipeline] if earlier is None else [earlier, pipeline]
        wish = {"pictures": str(styles.get(token, styles["monet"])), "token": token, "base": earlier is not None}
        result = run_plugin(MuseumMaker(), inputs, folder, {**FEW, **wish, **params})
        return FolderModel(folder / "out", name=token, family="zoo", adapter_type="lora"), result

    return run


@pytest.fixture(scope="module")
def chain(learn, tmp_path_factory):
    """Three versions, and their results."""
    root, versions, earlier = tmp_path_factory.mktemp("chain"), [], None
    for token in ("monet", "klee", "miro"):
        earlier, result = learn(root / token, token, earlier)
        versions.append((earlier, result))
    return versions


@pytest.fixture
def trained(pipeline, styles, chain, tmp_path_factory):
    """A training of a second style that has not begun."""

    def make(**params):
        wish = MuseumParams(pictures=styles["klee"], token="klee", base=True, **{**FEW, **params})
        with LocalContext(tmp_path_factory.mktemp("context"), [chain[0][0], pipeline]) as context:
            studio = museum._open(context, pipeline)
        version = museum._read_version(chain[0][0], pipeline, studio, wish)
        pictures = read_pictures(wish.pictures, captioned=False)
        return Training(studio, version, pictures, wish, torch.Generator().manual_seed(5))

    return make


def test_versions_form_a_chain_and_earlier_tokens_stay_bit_by_bit(chain, pipeline):
    read = [read_museum(model) for model, _ in chain]
    assert [[style.token for style in one.styles] for one, _ in read] == [
        ["monet"], ["monet", "klee"], ["monet", "klee", "miro"],
    ]  # fmt: skip
    digests = [digest_of({path: model.sha256(path) for path in model.files()}) for model, _ in chain]
    assert [one.parent for one, _ in read] == [None, *digests[:2]]
    assert len({one.base for one, _ in read}) == 1
    stored = [load_file(model.files()[FILE]) for model, _ in chain]
    for before, after in pairwise(stored):
        assert all(torch.equal(after[name], row) for name, row in before.items())
    assert [style.sha256 for style in read[2][0].styles] == [hash_of(row) for row in read[2][1].values()]
    assert all(result.outputs[0].relation == Relation.ADAPTER for _, result in chain)


def test_the_lora_and_the_new_token_alone_have_gradients(trained):
    training = trained()
    frozen = {name: p.clone() for name, p in training.network.named_parameters()}
    before = {name: [f.detach().clone() for f in pair] for name, pair in training.shared.items()}
    earlier, token = training.version.tokens["monet"].clone(), training.token.detach().clone()
    training.step(1.0)
    assert all(p.grad is None and torch.equal(p, frozen[name]) for name, p in training.network.named_parameters())
    assert training.version.tokens["monet"].grad is None
    assert torch.equal(training.version.tokens["monet"], earlier)
    assert training.token.grad.abs().sum() > 0
    assert not torch.equal(training.token, token)
    assert all(not torch.equal(pair[1], before[name][1]) for name, pair in training.shared.items())


def test_both_regularisers_say_nothing_before_the_first_step(trained):
    training = trained()
    draw = training._draw(4, torch.Generator().manual_seed(1))
    assert training.moved(draw, "monet").item() == 0
    # Numerator and denominator are sums in float32.
    assert training.cosine().item() == pytest.approx(1, abs=1e-6)
    training.step(1.0)
    assert training.moved(draw, "monet").item() > 0


def test_the_cosine_is_that_of_the_dense_updates(trained):
    training = trained()
    training.step(1.0)
    wanted = []
    for name, (down, up) in training.shared.items():
        old_down, old_up = training.version.shared[name]
        pair = torch.stack([(up @ down).flatten(), (old_up @ old_down).flatten()]).detach().double()
        wanted.append(torch.nn.functional.cosine_similarity(pair[0], pair[1], dim=0))
    assert training.cosine().item() == pytest.approx(torch.stack(wanted).mean().item(), abs=1e-5)  # float32 factors


def test_a_strong_weight_term_keeps_the_direction(trained):
    def angle(strength):
        training = trained(direction=strength, features=0)
        for step in range(8):
            training.step(1 - step / 8)
        return 1 - training.cosine().item()

    assert angle(1e6) < 0.3 * angle(0)


def test_a_strong_feature_term_keeps_earlier_answers(trained):
    def moved(strength):
        training = trained(features=strength, direction=0)
        for step in range(8):
            training.step(1 - step / 8)
        return training.measured().moved["monet"]

    assert moved(1e3) < 0.5 * moved(0)


def test_training_lowers_the_loss(learn, tmp_path):
    _, result = learn(tmp_path / "more", "monet", steps=20, batch=4)
    assert result.report["style_loss"]["after"] < 0.98 * result.report["style_loss"]["before"]


@pytest.mark.parametrize("steps", [1, 2])
def test_a_training_that_diverges_is_refused(steps, learn, tmp_path, monkeypatch):
    def diverge(self, _closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(1e30)

    monkeypatch.setattr(torch.optim.Adam, "step", diverge)
    with pytest.raises(UsageError, match=r"training of <monet> has diverged.*lower --learning-rate"):
        learn(tmp_path / "job", "monet", steps=steps)
    assert not any((tmp_path / "job/out").iterdir())


def test_restyled_latents_have_the_layout_of_one_and_the_moments_of_the_other():
    content, style = torch.randn(2, 3, 8, 8), 3 * torch.randn(2, 3, 8, 8) + 1
    found = restyled(content, style)
    # The deviation has 1e-5 added to it before it divides.
    assert torch.allclose(found.mean((2, 3)), style.mean((2, 3)), atol=1e-4)
    assert torch.allclose(found.std((2, 3)), style.std((2, 3)), atol=1e-3)
    pair = [(z - z.mean((2, 3), keepdim=True)).flatten(2) for z in (content, found)]
    assert torch.allclose(torch.cosine_similarity(*pair, dim=2), torch.ones(2, 3), atol=1e-4)


def test_what_is_suppressed_is_replaced_by_the_teachers_redrawing(trained):
    seeded = torch.Generator
    pure = trained(suppress=0)._draw(4, seeded().manual_seed(1))
    half, whole = (trained(suppress=share)._draw(4, seeded().manual_seed(1)) for share in (0.5, 1))
    assert torch.equal(pure.times, half.times)
    # Targets and noised latents are linear in the latents, so the half lies between, up to float32 rounding.
    assert torch.allclose(half.noised, (pure.noised + whole.noised) / 2, atol=1e-4)
    assert not torch.allclose(pure.noised, whole.noised, atol=1e-2)


def test_it_is_recognised_as_a_lora(chain):
    model, _ = chain[2]
    found = recognise(list_model(model.files()[FILE].parent))
    assert (found.kind, found.adapter_type) == (ModelKind.ADAPTER, "lora")
    assert any(PREFIX in name for name in found.unmatched)
    assert found.metadata["style_tokens"] == ["<monet>", "<klee>", "<miro>"]


def test_other_mergers_take_the_lora_and_name_the_tokens(chain, tmp_path):
    model, _ = chain[1]
    result = run_plugin(Sum(), [model], tmp_path / "sum", {"weights": [2.0]})
    assert result.report["coverage"][0]["unmatched_names"] == [f"{PREFIX}monet", f"{PREFIX}klee"]
    merged = read_adapter(FolderModel(tmp_path / "sum/out", name="sum", adapter_type="lora")).modules
    for name, factors in read_adapter(model).modules.items():
        # Factors pass a QR and an SVD in float32.
        assert torch.allclose(merged[name].up @ merged[name].down, 2 * factors.up @ factors.down, atol=1e-5)


def test_diffusers_loads_the_lora(chain):
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    state = StableDiffusionLoraLoaderMixin.lora_state_dict(load_file(chain[0][0].files()[LORA]))[0]
    assert state
    assert all("lora" in name for name in state)


def test_previews_paint_with_the_token(chain, pipeline, tmp_path):
    def png(prompt, *adapters):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        params = {"prompts": [prompt], "steps": 2}
        result = run_plugin(DiffusersPreviewer(), [pipeline, *adapters], folder, params)
        return np.asarray(Image.open(folder / "out" / PICTURE).convert("RGB")).tobytes(), result.report

    model, _ = chain[1]
    plain, report = png("a cat", model)
    assert report["adapters"][0]["style_tokens"] == ["<monet>", "<klee>"]
    assert report["adapters"][0]["tensors_not_understood"] == 0
    painted = {plain, png("a cat <monet>", model)[0], png("a cat <klee>", model)[0]}
    assert len(painted) == 3
    assert png("<monet> a cat", model)[0] in painted  # where it stands makes no difference
    before = png("a cat <monet>")[0]
    assert before == png("a cat <monet>")[0]  # the warm painter has forgotten the token
    assert before not in painted


def test_a_negative_prompt_is_plain_text(pipeline, tmp_path):
    painter = open_painter(pipeline, tmp_path)
    params = PreviewParams(prompts=("a cat",), steps=1, guidance_scale=4, negative_prompt="<monet>")
    plain = painter.paint([("a cat", 0)], params, lambda _done: None)
    painter.tokens["monet"] = torch.full((1, WIDTH), 3.0)
    assert painter.paint([("a cat", 0)], params, lambda _done: None) == plain
    assert painter.paint([("a cat <monet>", 0)], params, lambda _done: None) != plain


def test_versions_that_share_tokens_are_previewed_together(learn, chain, pipeline, tmp_path):
    params = {"prompts": ["a cat <monet>"], "steps": 1}
    result = run_plugin(DiffusersPreviewer(), [pipeline, chain[0][0], chain[1][0]], tmp_path / "both", params)
    assert [one["style_tokens"] for one in result.report["adapters"]] == [["<monet>"], ["<monet>", "<klee>"]]
    other, _ = learn(tmp_path / "other", "monet", steps=1)
    with pytest.raises(UsageError, match="mean different styles by the token <monet>"):
        run_plugin(DiffusersPreviewer(), [pipeline, chain[0][0], other], tmp_path / "two", params)


def test_the_same_seed_gives_the_same_bytes(learn, chain, tmp_path):
    model, _ = learn(tmp_path / "again", "monet")
    for name in (LORA, FILE):
        assert model.files()[name].read_bytes() == chain[0][0].files()[name].read_bytes()


def test_it_keeps_the_contract(pipeline, styles):
    values = {"pictures": str(styles["monet"]), "token": "monet", "steps": 2, "batch": 1}
    checks = check_plugin(MuseumMaker(), [pipeline], values)
    # The kit takes the target of a symbolic link for written; the pipeline's folder is laid out with links.
    assert [check for check in checks if not check.ok and check.name != "writes only into its output folder"] == []


def test_prompts_are_parted_from_their_tokens():
    rows = {"a": torch.ones(1, 4), "b": torch.zeros(1, 4)}
    text, used = split_prompt("a <b> cat,  <c> <a>", rows)
    assert text == "a cat, <c>"
    assert [row is rows[name] for row, name in zip(used, "ba", strict=True)] == [True, True]
    states = torch.full((2, 3, 4), 5.0)
    placed = place_rows(states, [used, []])
    assert torch.equal(placed[0], torch.cat([states[0, :1], rows["b"], rows["a"]]))
    assert torch.equal(placed[1], states[1])
    with pytest.raises(UsageError, match="another base"):
        place_rows(states, [[torch.ones(1, 5)], []])
    with pytest.raises(UsageError, match="or are too many"):
        place_rows(states, [[rows["a"]] * 4, []])


def test_inputs_that_do_not_belong_together_are_refused(learn, chain, pipeline, styles, make, tmp_path):
    (first, _), other = chain[0], tmp_path / "other"
    with pytest.raises(UsageError, match="knows <monet> already"):
        learn(tmp_path / "1", "monet", first)
    with pytest.raises(UsageError, match="has rank 8"):
        learn(tmp_path / "2", "klee", first, rank=4)
    with pytest.raises(UsageError, match="has no style tokens"):
        learn(tmp_path / "3", "klee", make("plain")[0])
    wish = {"pictures": str(styles["klee"]), "token": "klee"}
    with pytest.raises(UsageError, match="a base alone"):
        run_plugin(MuseumMaker(), [first], tmp_path / "4", wish)
    with pytest.raises(UsageError, match="which is no base"):
        run_plugin(MuseumMaker(), [first, first], tmp_path / "5", {**wish, "base": True})
    shutil.copytree(next(iter(pipeline.files().values())).parents[1], other)
    file = other / "unet/diffusion_pytorch_model.safetensors"
    save_file({name: 2 * weight for name, weight in load_file(file).items()}, file)
    with pytest.raises(UsageError, match="another base"):
        run_plugin(MuseumMaker(), [first, FolderModel(other)], tmp_path / "6", {**wish, "base": True})
    (other / "model_index.json").unlink()
    with pytest.raises(UsageError, match="cannot paint"):
        run_plugin(MuseumMaker(), [FolderModel(other)], tmp_path / "7", wish)
    assert not list(tmp_path.glob("[0-9]/out/*"))


def test_pictures_that_cannot_be_learned_are_refused(learn, tmp_path):
    empty, broken, vast = (tmp_path / name for name in ("empty", "broken", "vast"))
    for folder in (empty, broken, vast):
        folder.mkdir()
    (broken / "a.png").write_bytes(b"no picture")
    Image.new("1", (1 << 13, (1 << 13) + 1)).save(vast / "a.png")
    with pytest.raises(NotFoundError):
        learn(tmp_path / "1", "x", pictures=str(tmp_path / "missing"))
    with pytest.raises(UsageError, match="holds no pictures"):
        learn(tmp_path / "2", "x", pictures=str(empty))
    with pytest.raises(DataError, match=r"a\.png is no picture"):
        learn(tmp_path / "3", "x", pictures=str(broken))
    with pytest.raises(DataError, match="8192 × 8193 pixels"):
        learn(tmp_path / "4", "x", pictures=str(vast))


@pytest.mark.parametrize("fault", ["hash", "shape", "json"])
def test_a_damaged_file_of_tokens_is_refused(fault, chain, tmp_path):
    shutil.copytree(chain[0][0].files()[FILE].parent, tmp_path / "copy")
    said = chain[0][0].metadata()[KEY]
    row = torch.zeros(2 if fault == "shape" else 1, WIDTH)
    save_file({f"{PREFIX}monet": row}, tmp_path / "copy" / FILE, {KEY: json.dumps([]) if fault == "json" else said})
    with pytest.raises(DataError, match=r"style_tokens|is broken"):
        read_museum(FolderModel(tmp_path / "copy"))
    claimed = recognise(list_model(tmp_path / "copy")).metadata
    assert ("style_tokens" in claimed) == (fault != "json")
