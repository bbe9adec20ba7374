"""Adapters baked into a base, against what diffusers fuses and float64 arithmetic."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.recipes import recipe_of
from modelgrove_hub.tables import Relation
from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_plugins.merge.orthogonal import Orthogonal
from modelgrove_plugins.merge.sum import Sum
from modelgrove_plugins.merge.ties import Ties

FILE = "unet/diffusion_pytorch_model.safetensors"
QKV = "transformer_blocks.0.attn"


def make_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=24,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
    )  # fmt: skip


def write_base(folder, dtype=torch.float32):
    make_unet().to(dtype).save_pretrained(folder / "unet")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}), "utf-8")
    return FolderModel(folder, name="base")


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base")


@pytest.fixture
def lora(tmp_path):
    """A LoRA of the base in diffusers' naming, written by diffusers."""

    def write(name, seed, **options):
        unet = make_unet()
        targets = {"target_modules": ["to_q", "conv1", "proj_in"]}
        unet.add_adapter(LoraConfig(**({"r": 4, "lora_alpha": 4} | targets | options)))
        torch.manual_seed(seed)
        for parameter_name, parameter in unet.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.1)
        unet.save_lora_adapter(tmp_path / name)
        return FolderModel(tmp_path / name, name=name, adapter_type="lora")

    return write


def bake(models, base, folder, plugin=Sum, **params):
    result = run_plugin(plugin(), [*models, base], folder, params | {"base": True})
    return result, load_file(folder / "out" / FILE)


def fused(loras, weights):
    """The UNet's weights after diffusers fused the LoRAs in."""
    unet, names = make_unet(), [lora.name for lora in loras]
    for lora in loras:
        [path] = lora.files().values()
        unet.load_lora_adapter(path, prefix=None, adapter_name=lora.name)
    unet.set_adapters(names, list(weights))
    unet.fuse_lora(adapter_names=names)
    state = unet.state_dict()
    return {name.replace(".base_layer", ""): tensor for name, tensor in state.items() if "lora_" not in name}


def test_the_result_is_what_diffusers_fuses(base, lora, tmp_path):
    models = [lora("a", 1), lora("b", 2)]
    result, found = bake(models, base, tmp_path / "job", weights=[0.7, -0.4])
    wanted = fused(models, [0.7, -0.4])
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        # float32 products in another order.
        assert torch.allclose(found[name], tensor, rtol=0, atol=2e-6), name
    assert result.outputs[0].relation is Relation.MERGE
    assert "model_index.json" in result.outputs[0].files
    for row in result.report["coverage"]:
        assert row["in_base"] == row["modules"] > 10
        assert row["not_in_base"] == []


def test_half_precision_is_rounded_once(lora, tmp_path):
    base = write_base(tmp_path / "half", torch.bfloat16)
    models = [lora(name, seed) for seed, name in enumerate("abcdefgh")]
    _, found = bake(models, base, tmp_path / "job", weights=[0.01] * 8)
    origin = {name: tensor.double() for name, tensor in make_unet().to(torch.bfloat16).state_dict().items()}
    exact = {name: tensor.double() for name, tensor in fused(models, [0.01] * 8).items()}
    start = {name: tensor.double() for name, tensor in make_unet().state_dict().items()}
    for name, tensor in found.items():
        wanted = origin[name] + (exact[name] - start[name])
        # Half of bfloat16's spacing is 2^-9 of a value; the reference's float32 noise may tip a tie.
        assert bool(((tensor.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-6).all())


def test_a_dora_is_baked_with_the_base_s_weights(base, lora, tmp_path):
    model = lora("dora", 1, use_dora=True, target_modules=["to_q"])
    _, found = bake([model], base, tmp_path / "job")
    wanted = fused([model], [1.0])
    changed = [name for name, tensor in make_unet().state_dict().items() if not torch.equal(found[name], tensor)]
    assert changed
    for name in wanted:
        assert torch.allclose(found[name], wanted[name], rtol=0, atol=2e-6), name


def test_any_method_is_baked_as_it_joins(base, lora, tmp_path):
    models = [lora("a", 1), lora("b", 2)]
    _, found = bake(models, base, tmp_path / "job", Orthogonal)
    run_plugin(Orthogonal(), models, tmp_path / "joined", {})
    joined = FolderModel(tmp_path / "joined/out", name="joined", adapter_type="lora")
    _, wanted = bake([joined], base, tmp_path / "again")
    for name, tensor in wanted.items():
        # One more decomposition in float32.
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-5), name


def test_what_has_no_place_in_the_base_is_told(base, lora, make, tmp_path):
    other = make("other", shapes={"mid_block.attentions.0.proj_in": (32, 32), "no_block.0.proj": (8, 8)})[0]
    result, _ = bake([other], base, tmp_path / "job")
    [row] = result.report["coverage"]
    assert (row["in_base"], row["not_in_base"]) == (1, ["no_block.0.proj"])
    assert "1 of 2 modules are not in the base" in result.report["warnings"][0]


def test_an_adapter_of_nothing_in_the_base_is_refused(base, make, tmp_path):
    with pytest.raises(UsageError, match=r"none of the adapters' modules is in base, such as no_block"):
        bake([make("other", shapes={"no_block.0.proj": (8, 8)})[0]], base, tmp_path / "job")
    assert not list((tmp_path / "job/out").rglob("*.safetensors"))


def test_an_adapter_of_other_sizes_is_refused_with_both(base, make, tmp_path):
    other = make("other", shapes={"mid_block.attentions.0.proj_in": (64, 32)})[0]
    with pytest.raises(UsageError, match=r"64×32 in other but 32×32 in base"):
        bake([other], base, tmp_path / "job")


def test_a_base_of_integers_is_refused_with_the_way_out(make, tmp_path):
    (tmp_path / "packed").mkdir()
    save_file({"proj.weight": torch.ones(8, 8, dtype=torch.int8)}, tmp_path / "packed/model.safetensors")
    base = FolderModel(tmp_path / "packed", name="packed")
    with pytest.raises(UsageError, match="compressed from"):
        run_plugin(Sum(), [make("a", shapes={"proj": (8, 8)})[0], base], tmp_path / "job", {"base": True})


def test_an_infinite_result_is_refused_by_tensor(make, tmp_path):
    (tmp_path / "half").mkdir()
    save_file({"proj.weight": torch.ones(8, 8)}, tmp_path / "half/model.safetensors")
    base = FolderModel(tmp_path / "half", name="half")
    huge = {"unet.proj.lora_A.weight": torch.full((2, 8), 1e30), "unet.proj.lora_B.weight": torch.full((8, 2), 1e30)}
    with pytest.raises(DataError, match=r"proj\.weight"):
        run_plugin(Sum(), [make.write("a", huge), base], tmp_path / "job", {"base": True})


def test_a_result_beyond_half_precision_is_refused_by_tensor(make, tmp_path):
    save_file({"proj.weight": torch.full((8, 8), 60000.0).half()}, tmp_path / "base.safetensors")
    base = FolderModel(tmp_path / "base.safetensors", name="base")
    large = {"unet.proj.lora_A.weight": torch.full((2, 8), 100.0), "unet.proj.lora_B.weight": torch.full((8, 2), 100.0)}
    with pytest.raises(DataError, match=r"proj\.weight would hold NaN or infinite values as F16"):
        run_plugin(Sum(), [make.write("a", large), base], tmp_path / "job", {"base": True})


def test_adapters_of_fused_native_names_meet_split_ones(make, tmp_path):
    """kohya's Flux LoRA on a diffusers base, and diffusers' LoRA on a single file."""
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 8, generator=generator), torch.randn(24, 2, generator=generator)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    native = make.write("native", {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up})
    parts = {
        f"transformer.{QKV}.to_{x}.lora_{side}.weight": tensor
        for place, x in enumerate("qkv")
        for side, tensor in (("A", down.clone()), ("B", up[8 * place : 8 * place + 8].clone()))
    }
    split = make.write("split", parts)
    weights = torch.randn(24, 8, generator=generator)
    for name, tensors in {
        "single": {"double_blocks.0.img_attn.qkv.weight": weights},
        "folder": {f"{QKV}.to_{x}.weight": weights[8 * i : 8 * i + 8].clone() for i, x in enumerate("qkv")},
    }.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        base = FolderModel(tmp_path / f"{name}.safetensors", name=name)
        result = run_plugin(Sum(), [native, split, base], tmp_path / f"job-{name}", {"base": True, "weights": [1, 0.5]})
        written = load_file(tmp_path / f"job-{name}/out/{name}.safetensors")
        found = torch.cat([written[key] for key in tensors])
        assert torch.allclose(found, weights + 1.5 * up @ down, atol=1e-5)
        assert [row["in_base"] for row in result.report["coverage"]] == [3, 3]


@pytest.mark.parametrize("plugin", [Sum, Ties])
@pytest.mark.parametrize("naming", ["native", "diffusers"])
def test_halves_that_diffusers_swaps_are_baked_where_the_base_has_them(naming, plugin, make, tmp_path):
    """Flux's last modulation: a LoRA of either naming changes a base of either naming alike."""
    generator = torch.Generator().manual_seed(0)
    down, up, bias = (torch.randn(shape, generator=generator) for shape in ((2, 8), (16, 2), (16,)))
    weight = torch.randn(16, 8, generator=generator)
    if naming == "native":
        stem, sides = "diffusion_model.final_layer.adaLN_modulation.1", up
        beside = "diffusion_model.double_blocks.0.img_attn.proj"
    else:
        stem, sides, beside = "transformer.norm_out.linear", up.roll(8, 0), f"transformer.{QKV}.to_out.0"
    tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": sides}
    tensors |= {f"{stem}.diff_b": bias if naming == "native" else bias.roll(8, 0)}
    tensors |= {f"{beside}.lora_A.weight": torch.zeros(2, 8), f"{beside}.lora_B.weight": torch.zeros(8, 2)}
    model = make.write("last", tensors)
    last = "final_layer.adaLN_modulation.1"
    bases = {
        "single": {f"{last}.weight": weight, f"{last}.bias": torch.ones(16)},
        "folder": {"norm_out.linear.weight": weight.roll(8, 0), "norm_out.linear.bias": torch.ones(16)},
    }
    bases["single"]["double_blocks.0.img_attn.proj.weight"] = torch.ones(8, 8)
    bases["folder"][f"{QKV}.to_out.0.weight"] = torch.ones(8, 8)
    for name, stored in bases.items():
        save_file(stored, tmp_path / f"{name}.safetensors")
        base = FolderModel(tmp_path / f"{name}.safetensors", name=name)
        folder = tmp_path / f"job-{name}"
        params = {"base": True} | ({"space": "full", "density": 1.0} if plugin is Ties else {})
        result = run_plugin(plugin(), [model, base], folder, params)
        written = load_file(folder / f"out/{name}.safetensors")
        found, shift = (written[key] for key in list(stored)[:2])
        if name == "folder":
            found, shift = found.roll(8, 0), shift.roll(8, 0)
        torch.testing.assert_close(found, weight + up @ down, rtol=1e-5, atol=1e-5)  # float32, in another order
        torch.testing.assert_close(shift, 1 + bias, rtol=0, atol=1e-6)
        assert [row["in_base"] for row in result.report["coverage"]] == [3]


def test_a_dora_of_fused_names_needs_a_base_in_them(make, tmp_path):
    stem = "diffusion_model.double_blocks.0.img_attn.qkv"
    shapes = {".lora_A.weight": (2, 8), ".lora_B.weight": (24, 2), ".dora_scale": (24, 1)}
    model = make.write("dora", {stem + end: torch.ones(shape) for end, shape in shapes.items()})
    save_file({f"{QKV}.to_{x}.weight": torch.ones(8, 8) for x in "qkv"}, tmp_path / "folder.safetensors")
    base = FolderModel(tmp_path / "folder.safetensors", name="folder")
    with pytest.raises(UsageError, match=r"img_attn\.qkv of a dora adapter is not in folder.* names its modules alike"):
        run_plugin(Sum(), [model, base], tmp_path / "job", {"base": True})


def test_the_recipe_names_the_base(base, lora, tmp_path):
    bake([lora("a", 1)], base, tmp_path / "job", weights=[0.5])
    recipe = recipe_of(FolderModel(tmp_path / "job/out").metadata(), "baked")
    assert recipe.base.name == "base"
    assert [(model.name, model.weight) for model in recipe.models] == [("a", 0.5)]
    assert recipe.params()["base"] is True


@pytest.mark.parametrize("params", [{"rank": 4}, {"energy": 0.9}])
def test_a_checkpoint_has_no_rank(params, base, lora, tmp_path):
    with pytest.raises(UsageError, match="exact update"):
        bake([lora("a", 1)], base, tmp_path / "job", **params)


def test_a_bias_s_difference_finds_its_place(base, make, tmp_path):
    [bias] = [tensor for tensor in base.tensors() if tensor.key == "conv_in.bias"]
    model = make.write("bias", {"lora_unet_conv_in.diff_b": torch.ones(bias.shape)})
    result, found = bake([model], base, tmp_path / "job")
    assert torch.equal(found["conv_in.bias"], bias.read() + 1)
    assert result.report["warnings"] == []
