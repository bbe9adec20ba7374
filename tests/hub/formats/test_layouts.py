"""Adapters in the key names that their trainers write, of the shapes that the networks have (widths scaled down)."""

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers
from real_configs import listing
from safetensors.torch import save_file

from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.adapters import open_adapter, read_adapter
from modelgrove_hub.formats.recognise import recognise
from modelgrove_hub.formats.updates import open_updates
from modelgrove_hub.testing import FolderModel

WIDTH = 8


def pair(stem, out, inside, down=".lora_A.weight", up=".lora_B.weight", rank=2):
    return {stem + down: torch.randn(rank, inside), stem + up: torch.randn(out, rank)}


def saved(folder, tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "m.safetensors")
    return FolderModel(folder / "m.safetensors", name="mine")


def product(factors):
    return factors.up.double() @ factors.down.double()


def xlabs(prefix=""):
    """XLabs' realism LoRA: both streams of double blocks, and single blocks in x-flux-comfyui's files."""
    ends = {"down": ".down.weight", "up": ".up.weight"}
    tensors = {}
    for stream in (1, 2):
        block = f"{prefix}double_blocks.3.processor"
        tensors |= pair(f"{block}.qkv_lora{stream}", 3 * WIDTH, WIDTH, **ends)
        tensors |= pair(f"{block}.proj_lora{stream}", WIDTH, WIDTH, **ends)
    block = f"{prefix}single_blocks.7.processor"
    return (
        tensors
        | pair(f"{block}.qkv_lora", 3 * WIDTH, WIDTH, **ends)
        | pair(f"{block}.proj_lora", WIDTH, 5 * WIDTH, **ends)
    )


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs_loras_are_what_diffusers_converts(prefix, tmp_path):
    torch.manual_seed(0)
    tensors = xlabs(prefix)
    found = open_updates(saved(tmp_path, tensors))
    wanted = _convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    names = {name.removeprefix("transformer.").split(".lora_")[0] for name in wanted}
    assert (set(found.targets), found.unmatched) == (names, ())
    for name in names:
        down, up = (wanted[f"transformer.{name}.lora_{side}.weight"].double() for side in "AB")
        assert torch.equal(product(found.targets[name].read()), up @ down), name  # copies of the same numbers


def test_xlabs_loras_are_recognised():
    shapes = {}
    for stream in (1, 2):
        for part, out in (("qkv", 9216), ("proj", 3072)):
            stem = f"double_blocks.0.processor.{part}_lora{stream}"
            shapes |= {f"{stem}.down.weight": (16, 3072), f"{stem}.up.weight": (out, 16)}
    found = recognise(listing(shapes))
    assert (found.kind, found.adapter_type, found.family, found.coverage) == ("adapter", "lora", "flux", 1)
    assert found.ranks["common"] == 16
    assert found.targets == {"img_attn.qkv": 1, "img_attn.proj": 1, "txt_attn.qkv": 1, "txt_attn.proj": 1}


CONTROL = {
    "bfl": ["double_blocks.0.img_attn.norm.key_norm.scale", "single_blocks.0.norm.query_norm.scale"],
    "diffusers": ["transformer.transformer_blocks.0.attn.norm_q.weight"],
}


@pytest.mark.parametrize("naming", CONTROL)
def test_a_control_lora_is_told_and_refused_with_a_way_out(naming, tmp_path):
    first, block = {
        "bfl": ("img_in", "double_blocks.0.img_attn.proj"),
        "diffusers": ("transformer.x_embedder", "transformer.transformer_blocks.0.attn.to_out.0"),
    }[naming]
    tensors = pair(first, WIDTH, 16) | pair(block, WIDTH, WIDTH) | {f"{block}.lora_B.bias": torch.ones(WIDTH)}
    tensors |= {name: torch.ones(4) for name in CONTROL[naming]}
    with pytest.raises(UsageError, match=r"mine: .*norm.* belongs to a control-lora: .*FluxControlPipeline"):
        open_updates(saved(tmp_path, tensors))
    found = recognise(listing({name: tuple(tensor.shape) for name, tensor in tensors.items()}))
    assert (found.kind, found.adapter_type, found.coverage) == ("adapter", "control-lora", 1)
    assert any("FluxControlPipeline" in reason for reason in found.reasons)


SWAPPED = {
    "joint_blocks.23.context_block.adaLN_modulation.1": "transformer_blocks.23.norm1_context.linear",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
"""Layers whose halves diffusers swaps, as their authors call them → as diffusers does."""


@pytest.mark.parametrize(("native", "ours"), SWAPPED.items())
@pytest.mark.parametrize("spelled", ["diffusion_model.{}", "lora_unet_{}"])
def test_halves_are_swapped_as_diffusers_has_them(native, ours, spelled, tmp_path):
    torch.manual_seed(0)
    flat = spelled.startswith("lora_unet_")
    stem = spelled.format(native.replace(".", "_") if flat else native)
    other = spelled.format("joint_blocks_0_x_block_mlp_fc1" if flat else "joint_blocks.0.x_block.mlp.fc1")
    tensors = pair(stem, 2 * WIDTH, WIDTH) | {f"{stem}.diff_b": torch.arange(2.0 * WIDTH)} | pair(other, 32, WIDTH)
    found = open_updates(saved(tmp_path, tensors)).targets
    shift, scale = (tensors[f"{stem}.lora_B.weight"].double() @ tensors[f"{stem}.lora_A.weight"].double()).chunk(2)
    assert torch.equal(product(found[ours].read()), torch.cat([scale, shift]))
    assert found[f"{ours}.bias"].read().tolist() == [[*range(WIDTH, 2 * WIDTH), *range(WIDTH)]]


SD3 = {
    "x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_embedders_of_sd3_have_diffusers_names_beside_its_blocks_alone(prefix, tmp_path):
    def named(module):
        return prefix + (module.replace(".", "_") if prefix.endswith("_") else module)

    embedders = {}
    for module in SD3:
        embedders |= pair(named(module), WIDTH, WIDTH)
    block = pair(named("joint_blocks.0.x_block.attn.proj"), WIDTH, WIDTH)
    found = open_updates(saved(tmp_path, embedders | block)).targets
    assert found.keys() == {*SD3.values(), "transformer_blocks.0.attn.to_out.0"}
    assert {target.component for target in found.values()} == {"transformer"}
    assert open_updates(saved(tmp_path, embedders)).targets.keys() == SD3.keys()  # another family's


def test_fused_modules_are_parted_for_diff_and_basis_check_too(tmp_path):
    torch.manual_seed(0)
    tensors = pair("diffusion_model.double_blocks.0.img_attn.qkv", 3 * WIDTH, WIDTH)
    model = saved(tmp_path, tensors)
    names = {f"transformer_blocks.0.attn.to_{x}" for x in "qkv"}
    assert open_adapter(model).targets.keys() == names
    for name, factors in read_adapter(model).modules.items():
        assert torch.equal(product(factors), product(open_updates(model).targets[name].read()))
        assert factors.up.shape == (WIDTH, 2)
    twice = tensors | pair("transformer.transformer_blocks.0.attn.to_q", WIDTH, WIDTH)
    with pytest.raises(DataError, match=r"transformer_blocks\.0\.attn\.to_q twice"):
        open_adapter(saved(tmp_path, twice))


TO_Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT_Q = f"lora_unet_{TO_Q.replace('.', '_')}"
TE = "text_model.encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("stem", "down", "up", "target"),
    [
        (FLAT_Q, ".lora_down.weight", ".lora_up.weight", TO_Q),
        (FLAT_Q, ".lora_A.weight", ".lora_B.weight", TO_Q),
        (f"lora_te1_{TE.replace('.', '_')}", ".lora_down.weight", ".lora_up.weight", f"text_encoder.{TE}"),
        (f"lora_te2_{TE.replace('.', '_')}", ".lora_down.weight", ".lora_up.weight", f"text_encoder_2.{TE}"),
        (f"base_model.model.{TO_Q}", ".lora_A.default.weight", ".lora_B.default.weight", TO_Q),
        (f"base_model.model.{TO_Q}", ".lora_A.weight", ".lora_B.weight", TO_Q),
        (f"unet.{TO_Q}", ".lora.down.weight", ".lora.up.weight", TO_Q),
        (f"diffusion_model.{TO_Q}", ".lora_A.weight", ".lora_B.weight", TO_Q),
        (f"transformer.{TO_Q}", ".lora_A.weight", ".lora_B.weight", TO_Q),
        (f"text_encoder_2.{TE}", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight",
         f"text_encoder_2.{TE}"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", ".lora_down.weight", ".lora_up.weight",
         TO_Q),
    ],
)  # fmt: skip
@pytest.mark.parametrize("alpha", [None, torch.tensor(1.0), torch.tensor([1.0]), torch.tensor(0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_lora_is_read_from_every_naming(stem, down, up, target, alpha, dtype, tmp_path):
    torch.manual_seed(0)
    tensors = {name: tensor.to(dtype) for name, tensor in pair(stem, 6, 5, down, up).items()}
    written = tensors if alpha is None else tensors | {f"{stem}.alpha": alpha}
    found = open_updates(saved(tmp_path, written))
    assert (set(found.targets), found.unmatched) == ({target}, ())
    # kohya's trainer takes an alpha of 0 as the rank; halves of numbers of 24 bits are exact.
    scale = 0.5 if alpha is not None and float(alpha) else 1.0
    wanted = scale * (tensors[stem + up].double() @ tensors[stem + down].double())
    assert torch.equal(product(found.targets[target].read()), wanted)


@pytest.mark.parametrize(
    ("end", "value", "message"),
    [
        (".lora_A.weight", torch.full((2, 5), float("nan")), r"to_q\.lora_A\.weight holds NaN"),
        (".lora_B.weight", torch.full((6, 2), float("inf")), r"to_q\.lora_B\.weight holds NaN or infinite"),
        (".lora_A.weight", torch.ones(2, 5).to(torch.int8), r"to_q\.lora_A\.weight is I8"),
        (".lora_A.weight", torch.ones(2, 5).to(torch.float8_e4m3fn), r"to_q\.lora_A\.weight is F8_E4M3.* convert it"),
        (".lora_A.weight", torch.ones(3, 5), r"to_q\.lora_A\.weight .* and .*to_q\.lora_B\.weight .* not the factors"),
        (".alpha", torch.tensor([1.0, 2.0]), r"to_q\.alpha has shape \(2,\)"),
        (".alpha", torch.tensor(float("nan")), r"to_q\.alpha is nan"),
    ],
)
def test_what_is_wrong_is_refused_with_the_tensor_s_name(end, value, message, tmp_path):
    stem = f"unet.{TO_Q}"
    with pytest.raises(DataError, match=message):
        open_updates(saved(tmp_path, pair(stem, 6, 5) | {stem + end: value})).targets[TO_Q].read()


def test_mixed_ranks_and_a_factor_alone(tmp_path):
    other = TO_Q.replace("to_q", "to_k")
    tensors = pair(f"unet.{TO_Q}", 6, 5, rank=2) | pair(f"unet.{other}", 6, 5, rank=4)
    found = open_updates(saved(tmp_path, tensors | {"unet.conv_in.lora_A.weight": torch.ones(2, 5)}))
    assert [found.targets[name].read().rank for name in (TO_Q, other)] == [2, 4]
    assert found.unmatched == ("unet.conv_in.lora_A.weight",)
