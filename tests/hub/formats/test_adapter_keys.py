"""Module names against the classes that have the modules, and against diffusers' own conversions."""

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders.lora_conversion_utils import _convert_unet_lora_key, _maybe_map_sgm_blocks_to_diffusers

from modelgrove_hub.formats.adapter_keys import NATIVE, Role, flat, parse_key

NETWORKS = {
    "stable diffusion": lambda: diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
    ),
    "svd": lambda: diffusers.UNetSpatioTemporalConditionModel(block_out_channels=(32, 64, 64, 64)),
    "motion modules": lambda: diffusers.MotionAdapter(block_out_channels=(32, 64)),
    "flux": lambda: diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True),
    "sd3": lambda: diffusers.SD3Transformer2DModel(num_layers=2),
    "pixart": lambda: diffusers.PixArtTransformer2DModel(num_layers=1),
    "wan": lambda: diffusers.WanTransformer3DModel(num_layers=1, added_kv_proj_dim=5120, image_dim=1280),
    "hidream": lambda: diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=16, num_layers=1, num_single_layers=1, caption_channels=[64, 64],
        num_routed_experts=2, num_activated_experts=1,
    ),
    "clip": lambda: transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(num_hidden_layers=1)),
    "t5": lambda: transformers.T5EncoderModel(transformers.T5Config(num_layers=1, feed_forward_proj="gated-gelu")),
}  # fmt: skip
LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


@pytest.mark.parametrize("network", NETWORKS)
def test_flattened_names_of_real_networks_get_their_dots_back(network):
    with torch.device("meta"):
        modules = [name for name, module in NETWORKS[network]().named_modules() if isinstance(module, LAYERS)]
    assert modules
    for module in modules:
        key = parse_key(f"lora_unet_{flat(module)}.lora_down.weight")
        assert key is not None
        assert (key.module, key.restored) == (module, True)


def stability_modules():
    """Module names of a UNet with two layers a block in Stability's naming, as kohya flattens SDXL's."""
    resnet = ("in_layers.2", "emb_layers.1", "out_layers.3", "skip_connection")
    attention = ("proj_in", "proj_out", "transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn2.to_out.0",
                 "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2")  # fmt: skip
    for block in (1, 2, 4, 5, 7, 8):
        yield from (f"input_blocks.{block}.0.{part}" for part in resnet)
        yield from (f"input_blocks.{block}.1.{part}" for part in attention)
    yield from ("input_blocks.3.0.op", "input_blocks.6.0.op")
    yield from (f"middle_block.{place}.{part}" for place in (0, 2) for part in resnet)
    yield from (f"middle_block.1.{part}" for part in attention)
    for block in range(9):
        yield from (f"output_blocks.{block}.0.{part}" for part in resnet)
        yield from (f"output_blocks.{block}.1.{part}" for part in attention)
    yield from ("output_blocks.2.2.conv", "output_blocks.5.2.conv")
    yield from ("input_blocks.0.0", "out.2", "time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2")


def diffusers_name(module):
    """What diffusers makes of one kohya name."""

    class Config:
        layers_per_block = 2

    [name] = _maybe_map_sgm_blocks_to_diffusers({f"lora_unet_{flat(module)}.lora_down.weight": 0}, Config())
    path = _convert_unet_lora_key(name).replace(".processor.", ".").replace("to_out_lora", "to_out.0_lora")
    return path.removesuffix(".down.weight").removesuffix("_lora").removesuffix(".lora")


def test_stability_s_blocks_are_renamed_as_diffusers_renames_them():
    for module in stability_modules():
        key = parse_key(f"lora_unet_{flat(module)}.lora_down.weight")
        assert key is not None
        assert key.module == diffusers_name(module)
        dotted = parse_key(f"diffusion_model.{module}.lora_A.weight")
        assert dotted is not None
        assert dotted.module == key.module


@pytest.mark.parametrize(
    ("name", "component", "module", "role"),
    [
        ("unet.conv_in.lora_A.weight", "unet", "conv_in", "down"),
        ("unet.a.attn1.processor.to_q_lora.down.weight", "unet", "a.attn1.to_q", "down"),
        ("unet.a.attn1.processor.to_out_lora.up.weight", "unet", "a.attn1.to_out.0", "up"),
        ("unet.a.ff.net.2.lora.up.weight", "unet", "a.ff.net.2", "up"),
        ("text_encoder.text_model.x.self_attn.q_proj.lora_linear_layer.down.weight", "text_encoder",
         "text_model.x.self_attn.q_proj", "down"),
        ("text_encoder.text_model.x.self_attn.to_out_lora.up.weight", "text_encoder",
         "text_model.x.self_attn.out_proj", "up"),
        ("lora_te1_text_model_encoder_layers_3_mlp_fc1.lora_up.weight", "text_encoder",
         "text_model.encoder.layers.3.mlp.fc1", "up"),
        ("lora_te2_text_model_encoder_layers_3_self_attn_k_proj.alpha", "text_encoder_2",
         "text_model.encoder.layers.3.self_attn.k_proj", "alpha"),
        ("base_model.model.transformer_blocks.0.attn.to_q.lora_A.default.weight", "", "transformer_blocks.0.attn.to_q",
         "down"),
        ("base_model.model.unet.conv_in.lora_B.weight", "unet", "conv_in", "up"),
        ("transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight", "transformer",
         "single_transformer_blocks.0.proj_mlp", "up"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", NATIVE, "double_blocks.0.img_attn.qkv", "down"),
        ("lora_unet_down_blocks_0_resnets_0_conv1.lora_A.weight", "unet", "down_blocks.0.resnets.0.conv1", "down"),
    ],
)  # fmt: skip
def test_each_convention_is_understood(name, component, module, role):
    key = parse_key(name)
    assert key is not None
    assert (key.component, key.module, key.role) == (component, module, Role(role))


def test_text_encoders_keep_their_component_in_the_canonical_name():
    unet, text = (parse_key(f"{part}.x.lora_A.weight") for part in ("unet", "text_encoder_2"))
    assert unet is not None
    assert text is not None
    assert (unet.target, text.target) == ("x", "text_encoder_2.x")


@pytest.mark.parametrize("name", ["conv_in.weight", "x.lora_embedding_A", "unet..lora_A", "x.lora_B.bias", "unet.", ""])
def test_other_names_are_no_lora_s(name):
    assert parse_key(name) is None
