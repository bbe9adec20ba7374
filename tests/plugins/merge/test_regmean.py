"""RegMean on a tiny pipeline: what is measured is what layers are given, and the merge is least squares on it."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelgrove_hub.errors import CorruptFileError, UsageError
from modelgrove_hub.formats.adapters import read_adapter
from modelgrove_hub.formats.sara import SparseWriter, origin_of
from modelgrove_hub.plugins import get_plugin
from modelgrove_hub.search.text import WIDTH
from modelgrove_hub.testing import FolderModel, LocalContext, check_plugin, run_plugin
from modelgrove_plugins.merge import moments as measuring
from modelgrove_plugins.merge.alignment import align
from modelgrove_plugins.merge.kept_moments import FILE, KeptMoments
from modelgrove_plugins.merge.moments import Moments
from modelgrove_plugins.merge.regmean import RegMean
from modelgrove_plugins.merge.wording import prompts_of

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0"
SHAPES = {
    f"{ATTENTION}.attn1.to_q": (32, 32),
    f"{ATTENTION}.attn2.to_k": (32, WIDTH),
    "mid_block.resnets.0.conv1": (32, 32, 3, 3),
}
FEW = {"pictures": 2, "steps": 2}


@pytest.fixture
def adapters(make):
    return [make(name, 4, shapes=SHAPES) for name in ("red-apple", "sleeping_cat")]


def based(model, base):
    """The model as if it was registered with its base."""
    return FolderModel(next(iter(model.paths.values())), name=model.name, adapter_type="lora", base=base)


def measured(pipeline, models, folder):
    with LocalContext(folder, [*models, pipeline]) as context:
        alignment = align(models, pipeline)
        kept = KeptMoments(context, (), pipeline, models, FEW, keep=False)
        found = Moments(context, pipeline, models, alignment.sites, **FEW, kept=kept)
        assert found.measurable == {site.name for site in alignment.sites}
        return {site.name: found.take(site.name, (0, 1)) for site in alignment.sites}


def test_it_keeps_the_contract(pipeline, adapters):
    inputs = [*(model for model, _ in adapters), pipeline]
    checks = check_plugin(RegMean, inputs=inputs, params={"base": True, **FEW})
    # The kit takes the target of a symbolic link for written; the base's folder is laid out with links.
    assert [check for check in checks if not check.ok and check.name != "writes only into its output folder"] == []
    assert get_plugin("merger.regmean") is RegMean


def test_moments_are_those_of_the_inputs_in_the_columns_of_the_file(pipeline, adapters, tmp_path):
    found = measured(pipeline, [model for model, _ in adapters], tmp_path / "job")
    for name, pair in found.items():
        columns = torch.Size(SHAPES[name][1:]).numel()
        for moment in pair:
            assert moment.shape == (columns, columns)
            assert torch.linalg.eigvalsh(moment.double())[0] > -1e-6 * float(moment.trace())
    # The middle of a kernel meets every pixel of its channel, the other places miss a border.
    diagonal = found["mid_block.resnets.0.conv1"][0].diagonal().view(32, 9)
    assert bool((diagonal[:, [4]] >= diagonal - 1e-6).all())


def test_each_adapter_is_watched_with_itself_in_the_base_and_the_base_is_restored(pipeline, adapters, tmp_path):
    (a, _), (b, _) = adapters
    one = measured(pipeline, [a, b], tmp_path / "one")
    other = measured(pipeline, [b, a], tmp_path / "other")
    for name, (first, second) in one.items():
        # Sums in another order.
        assert torch.allclose(first, other[name][1], rtol=1e-4, atol=1e-6)
        assert torch.allclose(second, other[name][0], rtol=1e-4, atol=1e-6)
    moved = one["mid_block.resnets.0.conv1"]
    assert float((moved[0] - moved[1]).norm()) > 1e-3 * float(moved[0].norm())


def test_the_result_is_the_closed_form_on_the_measured_moments(pipeline, adapters, tmp_path):
    models, updates = [model for model, _ in adapters], [exact for _, exact in adapters]
    moments = measured(pipeline, models, tmp_path / "moments")
    result = run_plugin(RegMean(), [*models, pipeline], tmp_path / "job", {"base": True, "weights": [1.0, 0.5], **FEW})
    assert result.report["inputs"]["measured_modules"] == result.report["inputs"]["shared_modules"] == 3
    baked = {tensor.key: tensor for tensor in FolderModel(tmp_path / "job/out").tensors()}
    before = {tensor.key: tensor for tensor in pipeline.tensors() if tensor.name.startswith("unet/")}
    for name, grams in moments.items():
        G = [0.9 * g.double() + 0.1 * torch.diag(g.double().diagonal()) for g in grams]
        mean = float(sum(G).diagonal().mean()) / 2
        G = [g + 1e-6 * mean * torch.eye(len(g)) for g in G]
        wanted = sum(w * exact[name] @ g for w, exact, g in zip((1.0, 0.5), updates, G, strict=True)) @ sum(G).inverse()
        found = baked[f"{name}.weight"].read().double().flatten(1) - before[f"{name}.weight"].read().double().flatten(1)
        # The base is stored in float16: its rounding against an update of about the same size.
        assert float((found - wanted).norm() / wanted.norm()) < 5e-3, name


def test_many_rounds_measure_what_one_does(pipeline, adapters, tmp_path, monkeypatch):
    models = [model for model, _ in adapters]
    together = measured(pipeline, models, tmp_path / "one")
    monkeypatch.setattr(measuring, "MOST", 0)
    apart = measured(pipeline, models, tmp_path / "other")
    for name, pair in together.items():
        assert all(torch.equal(x, y) for x, y in zip(pair, apart[name], strict=True))


def test_words_come_from_the_adapter_or_are_its_name(make):
    model, _ = make("red-apple", 2)
    assert prompts_of(model) == ("a picture of red apple",)
    named, _ = make("b", 2, summary={"metadata": {"trigger_words": ["sks dog", "sks cat"]}})
    assert prompts_of(named) == ("a picture of sks dog", "a picture of sks cat")


def test_it_needs_a_base_that_paints_and_adapters(pipeline, adapters, make, tmp_path):
    models = [model for model, _ in adapters]
    with pytest.raises(UsageError, match="give it with --base"):
        run_plugin(RegMean(), models, tmp_path / "no-base", FEW)
    with pytest.raises(UsageError, match="tiny-zoo is no adapter"):
        run_plugin(RegMean(), [pipeline, pipeline, pipeline], tmp_path / "whole", {"base": True, **FEW})


def test_a_registered_base_is_enough_to_make_an_adapter(pipeline, adapters, tmp_path):
    models = [model for model, _ in adapters]
    run_plugin(RegMean(), [*models, pipeline], tmp_path / "baked", {"base": True, **FEW})
    run_plugin(RegMean(), [based(model, pipeline) for model in models], tmp_path / "job", FEW)
    adapter = read_adapter(FolderModel(tmp_path / "job/out", adapter_type="lora")).modules
    baked = {tensor.key: tensor for tensor in FolderModel(tmp_path / "baked/out").tensors()}
    before = {tensor.key: tensor for tensor in pipeline.tensors() if tensor.name.startswith("unet/")}
    for name, part in adapter.items():
        wanted = (baked[f"{name}.weight"].read().float() - before[f"{name}.weight"].read().float()).flatten(1)
        found = part.up @ part.down.flatten(1)
        assert float((found - wanted).norm() / wanted.norm()) < 5e-3


def test_sparse_adapters_of_another_base_than_the_registered_one_are_refused(pipeline, tmp_path):
    name = f"{ATTENTION}.attn1.to_q.weight"
    [weight] = [tensor.read() for tensor in pipeline.tensors() if tensor.name == f"unet/{name}"]
    models = []
    for change in (0.0, 1.0):
        with LocalContext(tmp_path / str(change), []) as context:
            writer = SparseWriter(context.writer("sara.safetensors", {"format": "pt"}), 1.0)
            writer.add(f"unet.{name}", torch.arange(3), torch.full((3,), 0.1), origin_of(weight + change))
            writer.close()
        file = tmp_path / str(change) / "out/sara.safetensors"
        models.append(based(FolderModel(file, name=f"at {change}", adapter_type="sara"), pipeline))
    with pytest.raises(UsageError, match=r"at 1\.0 changes single weights of another base than tiny-zoo"):
        run_plugin(RegMean(), models, tmp_path / "job", FEW)


def test_what_was_measured_once_is_kept_and_gives_the_same_bytes(pipeline, adapters, make, tmp_path, monkeypatch):
    models = [model for model, _ in adapters]
    values = {"base": True, **FEW}
    first = run_plugin(RegMean(), [*models, pipeline], tmp_path / "first", {**values, "keep_inputs": True})
    assert first.artefacts == (FILE,)
    kept = tmp_path / "first/out" / FILE
    assert len(load_file(kept)) == 2 * len(SHAPES)

    def none(*_arguments):
        raise AssertionError("watched again")

    third, _ = make("green-tree", 4, shapes=SHAPES)
    more = {**values, "inputs": [str(kept)], "keep_inputs": True}
    run_plugin(RegMean(), [*models, third, pipeline], tmp_path / "three", more)  # one new adapter is watched
    assert len(load_file(tmp_path / "three/out" / FILE)) == 3 * len(SHAPES)

    monkeypatch.setattr(Moments, "_watched", none)
    run_plugin(RegMean(), [*reversed(models), pipeline], tmp_path / "again", {**values, "inputs": [str(kept)]})
    run_plugin(RegMean(), [*models, pipeline], tmp_path / "same", {**values, "inputs": [str(kept)]})
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "same/out" / unet).read_bytes() == (tmp_path / "first/out" / unet).read_bytes()


def test_kept_inputs_are_those_under_the_adapters_words(pipeline, adapters, tmp_path):
    models = [model for model, _ in adapters]
    renamed = FolderModel(next(iter(models[1].paths.values())), name="red-apple", adapter_type="lora")
    with LocalContext(tmp_path / "job", models) as context:
        kept = KeptMoments(context, (), pipeline, models, FEW, keep=True)
        kept.write("site", 1, torch.ones(2, 2))
    file = tmp_path / "job/out" / FILE
    with LocalContext(tmp_path / "again", models) as context:
        again = KeptMoments(context, (file,), pipeline, [models[1], renamed], FEW, keep=False)
        assert (again.holds("site", 0), again.holds("site", 1)) == (True, False)


def test_kept_inputs_of_another_base_or_measured_otherwise_are_refused(pipeline, adapters, tmp_path):
    models = [model for model, _ in adapters]
    run_plugin(RegMean(), [*models, pipeline], tmp_path / "first", {"base": True, **FEW, "keep_inputs": True})
    kept = str(tmp_path / "first/out" / FILE)
    with pytest.raises(UsageError, match="was measured with steps 2, this merge has 3"):
        values = {"base": True, "pictures": 2, "steps": 3, "inputs": [kept]}
        run_plugin(RegMean(), [*models, pipeline], tmp_path / "steps", values)
    shutil.copytree(next(iter(pipeline.paths.values())).parent, tmp_path / "other")
    (tmp_path / "other/note.txt").write_text("another revision")
    with pytest.raises(UsageError, match="was measured with base"):
        other = FolderModel(tmp_path / "other", name="other", family="zoo")
        run_plugin(RegMean(), [*models, other], tmp_path / "base", {"base": True, **FEW, "inputs": [kept]})
    for number, metadata in enumerate((None, {"modelgrove.inputs": "[" * 100_000})):
        file = tmp_path / f"{number}.safetensors"
        save_file({"x": torch.zeros(2)}, file, metadata)
        with pytest.raises(CorruptFileError, match="holds no moments"):
            values = {"base": True, **FEW, "inputs": [str(file)]}
            run_plugin(RegMean(), [*models, pipeline], tmp_path / str(number), values)
