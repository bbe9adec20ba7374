"""Rows of fused tensors against the values that diffusers' own conversions make of the same files."""

import original_names as original
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_unet_checkpoint,
    convert_open_clip_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import save_file

from modelgrove_hub.errors import DataError
from modelgrove_hub.formats.adapter_keys import flat
from modelgrove_hub.formats.native_names import pieces
from modelgrove_hub.formats.slots import slots_of
from modelgrove_hub.formats.updates import open_updates
from modelgrove_hub.testing import FolderModel

WIDTH = 32
FLUX = 3072
"""FLUX.1's width, which diffusers' conversion of single blocks and of kohya's LoRAs takes for granted."""
UNNAMED = ("norm_q", "norm_k", "norm_added")
"""Scales of norms, which no adapter has a name for."""


def flux():
    made = original.linear("img_in", WIDTH, 64) | original.linear("txt_in", WIDTH, 40)
    for name, inside in (("time_in", 256), ("vector_in", 24), ("guidance_in", 256)):
        made |= original.linear(f"{name}.in_layer", WIDTH, inside) | original.linear(f"{name}.out_layer", WIDTH, WIDTH)
    for name in ("double_blocks.0.img_attn.norm", "double_blocks.0.txt_attn.norm"):
        made |= {f"{name}.{x}_norm.scale": (8,) for x in ("query", "key")}
    return made | original.stream_blocks(WIDTH, 1, 0) | original.linear("final_layer.linear", 64, WIDTH)


def sd3():
    made = {"pos_embed": (1, 16, WIDTH)} | original.conv("x_embedder.proj", WIDTH, 16, 2)
    made |= original.linear("context_embedder", WIDTH, 40) | original.linear("final_layer.linear", 64, WIDTH)
    made |= original.linear("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    for name, inside in (("t_embedder", 256), ("y_embedder", 24)):
        made |= original.linear(f"{name}.mlp.0", WIDTH, inside) | original.linear(f"{name}.mlp.2", WIDTH, WIDTH)
    for i in range(3):
        for x in ("x_block", "context_block"):
            block, last, dual = f"joint_blocks.{i}.{x}", (i, x) == (2, "context_block"), (i, x) == (0, "x_block")
            rows = 2 if last else 9 if dual else 6
            made |= original.linear(f"{block}.adaLN_modulation.1", rows * WIDTH, WIDTH)
            for attention in ("attn", "attn2") if dual else ("attn",):
                made |= original.linear(f"{block}.{attention}.qkv", 3 * WIDTH, WIDTH)
                made |= {} if last else original.linear(f"{block}.{attention}.proj", WIDTH, WIDTH)
            if not last:
                made |= original.linear(f"{block}.mlp.fc1", 4 * WIDTH, WIDTH)
                made |= original.linear(f"{block}.mlp.fc2", WIDTH, 4 * WIDTH)
    return made


def unet(**sizes):
    return original.ldm_unet(width=8, context=24, **sizes)


def filled(shapes, prefix=""):
    torch.manual_seed(0)
    return {prefix + name: torch.randn(shape) for name, shape in shapes.items()}


def convert_flux(found):
    """Its conversion wants a single block, and that of the real width: kohya's LoRA tests those rows."""
    block = original.linear("single_blocks.0.linear1", 7 * FLUX, 1)
    block |= original.linear("single_blocks.0.linear2", 1, 1) | original.linear("single_blocks.0.modulation.lin", 1, 1)
    block |= {f"single_blocks.0.norm.{x}_norm.scale": (1,) for x in ("query", "key")}
    return convert_flux_transformer_checkpoint_to_diffusers(found | filled(block))


def written(folder, tensors):
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return FolderModel(path)


CONVERSIONS = {
    "flux": (flux, convert_flux, (*UNNAMED, "single_transformer_blocks")),
    "sd3": (sd3, convert_sd3_transformer_checkpoint_to_diffusers, UNNAMED),
    "sd1": (unet, lambda found: convert_ldm_unet_checkpoint(found, {"layers_per_block": 2}), ()),
    "sdxl": (
        lambda: unet(levels=(1, 2, 4), depths=(0, 2, 3), labels=40, flat=True),
        lambda found: convert_ldm_unet_checkpoint(found, {"layers_per_block": 2, "addition_embed_type": "text_time"}),
        (),
    ),
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("family", CONVERSIONS)
def test_slots_read_what_diffusers_converts(family, prefix, tmp_path):
    shapes, convert, apart = CONVERSIONS[family]
    tensors = filled(shapes(), prefix)
    found = slots_of(written(tmp_path, tensors))
    if family in ("sd1", "sdxl"):  # whose conversion knows the prefixed form only
        tensors = {f"model.diffusion_model.{name.removeprefix(prefix)}": tensor for name, tensor in tensors.items()}
    checked = 0
    for name, wanted in convert(dict(tensors)).items():
        module, _, parameter = name.rpartition(".")
        if parameter not in ("weight", "bias") or any(word in name for word in apart):
            continue
        slot = found[flat(module) + ("" if parameter == "weight" else ".bias")]
        assert torch.equal(slot.read(), wanted.reshape(slot.shape)), name
        checked += 1
    assert checked > 30


def test_slots_of_open_clip_read_what_diffusers_converts(tmp_path):
    prefix = "conditioner.embedders.1.model."
    shapes = original.open_clip_text(16, 2) | {"token_embedding.weight": (50, 16), "positional_embedding": (7, 16)}
    tensors = filled(shapes, prefix)
    found = slots_of(written(tmp_path, tensors))
    layers = {k: v for k, v in convert_open_clip_checkpoint(None, dict(tensors), prefix).items() if "layers" in k}
    assert len(layers) == 32
    for name, wanted in layers.items():
        module, _, parameter = name.rpartition(".")
        slot = found[flat(f"text_encoder_2.{module}") + ("" if parameter == "weight" else ".bias")]
        assert torch.equal(slot.read(), wanted.reshape(slot.shape)), name


KOHYA = {
    "double_blocks_1_img_attn_qkv": (3, 1), "double_blocks_1_txt_attn_qkv": (3, 1),
    "double_blocks_1_img_attn_proj": (1, 1), "double_blocks_1_txt_mlp_0": (4, 1), "double_blocks_1_img_mlp_2": (1, 4),
    "double_blocks_1_img_mod_lin": (6, 1), "single_blocks_30_linear1": (7, 1), "single_blocks_30_linear2": (1, 5),
    "single_blocks_30_modulation_lin": (3, 1),
}  # fmt: skip


def test_split_updates_of_kohya_s_flux_are_what_diffusers_converts(tmp_path):
    torch.manual_seed(0)
    tensors = {}
    for stem, (out, inside) in KOHYA.items():
        tensors[f"lora_unet_{stem}.lora_down.weight"] = torch.randn(2, inside * FLUX)
        tensors[f"lora_unet_{stem}.lora_up.weight"] = torch.randn(out * FLUX, 2)
        tensors[f"lora_unet_{stem}.alpha"] = torch.tensor(3.0)
    file = open_updates(written(tmp_path, tensors))
    converted = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    names = {name.removeprefix("transformer.").split(".lora_")[0] for name in converted}
    assert (set(file.targets), file.unmatched) == (names, ())
    for name in names:
        factors = file.targets[name].read()
        down, up = (converted[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
        # All rows, some columns. Where alpha / rank is multiplied in differs, so float32 rounds once on either side.
        found, wanted = (b.double() @ a[:, :16].double() for a, b in ((factors.down, factors.up), (down, up)))
        assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        ("single_blocks.0.linear1", (10, 8)),
        ("single_blocks.0.linear1", (24, 8)),
        ("single_blocks.0.linear1", (1, 5)),
        ("double_blocks.0.img_attn.qkv", (25, 8)),
        ("double_blocks.0.img_attn.qkv", (2, 8)),
    ],
)
def test_rows_that_cannot_be_shared_out_are_not_split(module, shape):
    assert pieces(module, shape) == ()


def test_a_module_under_both_names_is_refused(tmp_path):
    tensors = {
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(2, 8),
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": torch.ones(24, 2),
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 8),
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(8, 2),
    }
    with pytest.raises(DataError, match=r"transformer_blocks\.0\.attn\.to_q twice"):
        open_updates(written(tmp_path, tensors))


@pytest.mark.parametrize("component", ["unet", "transformer"])
def test_a_controlnet_beside_the_denoiser_does_not_take_its_place(component, tmp_path):
    for folder in ("controlnet", component):
        (tmp_path / folder).mkdir()
        save_file({"conv_in.weight": torch.ones(4, 3)}, tmp_path / folder / "model.safetensors")
    assert slots_of(FolderModel(tmp_path))["conv_in"].tensor.name.startswith(component)


def test_clip_s_embeddings_and_last_norm_are_named_as_its_layers_are(tmp_path):
    (tmp_path / "text_encoder").mkdir()
    names = ("final_layer_norm", "embeddings.token_embedding", "encoder.layers.0.layer_norm1")
    save_file({f"{name}.weight": torch.ones(4, 2) for name in names}, tmp_path / "text_encoder/model.safetensors")
    assert set(slots_of(FolderModel(tmp_path))) == {f"text_encoder_text_model_{flat(name)}" for name in names}
