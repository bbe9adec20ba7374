"""Where a checkpoint's modules lie: originals of real sizes against the modules that diffusers builds for them."""

from dataclasses import dataclass
from math import prod

import original_names as original
import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from real_configs import SDXL
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from modelgrove_hub.formats.adapter_keys import flat
from modelgrove_hub.formats.slots import slots_of
from modelgrove_hub.testing import FolderModel


@dataclass
class Named:
    """A header of any size without its bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "F16"
    file: str = "model.safetensors"

    @property
    def key(self):
        return self.name


class Headers:
    def __init__(self, shapes):
        self.shapes = shapes

    def tensors(self):
        return iter([Named(name, tuple(shape)) for name, shape in self.shapes.items()])


def weights(network, prefix=""):
    """Flat names and shapes of all weights and biases of a network on no device."""
    found = {}
    for name, tensor in network.state_dict().items():
        module, _, parameter = name.rpartition(".")
        if parameter in ("weight", "bias"):
            rows, columns = tensor.shape[0], prod(tensor.shape[1:])
            shape = (1, rows) if tensor.ndim == 1 else (rows, columns)
            found[flat(prefix + module) + ("" if parameter == "weight" else ".bias")] = shape
    return found


def sd1():
    return original.under("model.diffusion_model.", original.ldm_unet()), UNet2DConditionModel(cross_attention_dim=768)


def sdxl():
    shapes = original.ldm_unet(**original.SDXL)
    return original.under("model.diffusion_model.", shapes), UNet2DConditionModel(**SDXL)


def flux():
    return original.flux(), FluxTransformer2DModel(guidance_embeds=True)


def sd3():
    last = "joint_blocks.23.context_block.adaLN_modulation.1"
    shapes = original.sd3() | {f"{last}.weight": (3072, 1536), f"{last}.bias": (3072,)}
    return shapes, SD3Transformer2DModel(
        num_layers=24, num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536,
        pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=192, sample_size=128,
    )  # fmt: skip


@pytest.mark.parametrize("family", [sd1, sdxl, flux, sd3])
def test_every_module_of_a_single_file_is_found_under_diffusers_name(family):
    with torch.device("meta"):
        shapes, network = family()
    found = slots_of(Headers(shapes))
    wanted = weights(network)
    checked = 0
    for name, shape in wanted.items():
        if "norm_q" in name or "norm_k" in name or "norm_added" in name:
            continue
        assert found[name].shape == shape, name
        checked += 1
    assert checked > 200


def test_rows_of_a_fused_matrix_do_not_overlap_and_leave_none_out():
    found = slots_of(Headers(original.flux()))
    for name, parts in {
        "double_blocks.3.txt_attn.qkv.weight": ["add_q_proj", "add_k_proj", "add_v_proj"],
        "single_blocks.7.linear1.bias": ["to_q", "to_k", "to_v", "proj_mlp"],
    }.items():
        rows = [slot.rows for slot in found.values() if slot.tensor.name == name and slot.rows is not None]
        assert len(rows) == len(parts)
        ends = [0, *(part.stop for part in rows)]
        assert [part.start for part in rows] == ends[:-1]
        assert ends[-1] == original.flux()[name][0]


@pytest.mark.parametrize("prefix", ["cond_stage_model.model.", "conditioner.embedders.1.model."])
def test_open_clip_is_found_as_transformers_names_it(prefix):
    component = "text_encoder_2" if "embedders.1" in prefix else "text_encoder"
    found = slots_of(Headers(original.under(prefix, original.open_clip_text(1280, 32))))
    with torch.device("meta"):
        network = CLIPTextModel(
            CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)
        )
    wanted = {name: shape for name, shape in weights(network).items() if "embedding" not in name}
    assert len(wanted) > 300
    for name, shape in wanted.items():
        inner = name if name.startswith("text_model_") else f"text_model_{name}"
        assert found[f"{component}_{inner}"].shape == shape, name


@pytest.mark.parametrize(
    "prefix",
    ["cond_stage_model.transformer.", "conditioner.embedders.0.transformer.", "text_encoders.clip_l.transformer."],
)
def test_clip_is_found_in_every_container(prefix):
    found = slots_of(Headers(original.under(prefix, original.clip_text())))
    assert found["text_encoder_text_model_encoder_layers_3_self_attn_q_proj"].shape == (768, 768)
    assert found["text_encoder_text_model_encoder_layers_3_mlp_fc1.bias"].shape == (1, 3072)


def test_a_diffusers_folder_has_its_components(tmp_path):
    for folder, tensors in {
        "unet": {"conv_in.weight": torch.ones(4, 3, 3, 3), "conv_in.bias": torch.ones(4)},
        "text_encoder": {"encoder.layers.0.mlp.fc1.weight": torch.ones(8, 4)},
        "vae": {"encoder.conv_in.weight": torch.ones(4, 3)},
    }.items():
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
    found = slots_of(FolderModel(tmp_path))
    assert found["conv_in"].read().shape == (4, 27)
    assert found["conv_in.bias"].read().shape == (1, 4)
    # transformers 5 writes CLIP without the "text_model" that adapters have.
    assert found["text_encoder_text_model_encoder_layers_0_mlp_fc1"].shape == (8, 4)


def test_a_slot_of_a_fused_matrix_reads_its_rows(tmp_path):
    values = torch.arange(24.0).reshape(12, 2)
    save_file({"double_blocks.0.img_attn.qkv.weight": values}, tmp_path / "flux.safetensors")
    found = slots_of(FolderModel(tmp_path / "flux.safetensors"))
    assert torch.equal(found["transformer_blocks_0_attn_to_k"].read(), values[4:8])
    assert torch.equal(found["double_blocks_0_img_attn_qkv"].read(), values)
