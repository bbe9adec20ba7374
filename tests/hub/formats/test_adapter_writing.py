"""Written LoRAs against the libraries that load them: what they add must be what was written."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file

from modelgrove_hub.errors import UsageError
from modelgrove_hub.formats.adapter_writing import AdapterWriter
from modelgrove_hub.formats.adapters import Factors, read_adapter
from modelgrove_hub.testing import FolderModel, LocalContext

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
SHAPES = {
    f"{BLOCK}.attn1.to_q": (32, 32, ()),
    f"{BLOCK}.attn2.to_k": (32, 24, ()),
    "down_blocks.0.resnets.0.conv1": (16, 16, (3, 3)),
}
# Factors pass through float32 unchanged; the loaders multiply in another order.
EXACT = 1e-6


def make_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=24,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
    )  # fmt: skip


def make_factors(ranks=(2, 2, 5), component="unet"):
    generator = torch.Generator().manual_seed(0)
    return [
        Factors(
            module, component, kernel,
            torch.randn(rank, width * (9 if kernel else 1), generator=generator),
            torch.randn(out, rank, generator=generator),
        )
        for (module, (out, width, kernel)), rank in zip(SHAPES.items(), ranks, strict=True)
    ]  # fmt: skip


def write(folder, factors, naming="diffusers", dtype=torch.float32, metadata=None):
    components = {part.component for part in factors}
    with LocalContext(folder) as context:
        writer = AdapterWriter(context, naming, dtype, metadata or {}, components)
        for part in factors:
            writer.add(part)
        return writer.close()


def deltas(unet):
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight(module.active_adapters[0]).detach().flatten(1)
        for name, module in unet.named_modules()
        if isinstance(module, LoraLayer)
    }


def assert_same(found, factors, room=EXACT):
    assert found.keys() == {part.module for part in factors}
    for part in factors:
        wanted = part.up @ part.down
        assert torch.allclose(found[part.module].float(), wanted, rtol=0, atol=room * float(wanted.abs().max()))


def test_diffusers_loads_the_same_update_with_mixed_ranks(tmp_path):
    factors = make_factors()
    assert write(tmp_path, factors) == ("pytorch_lora_weights.safetensors",)
    unet = make_unet()
    unet.load_lora_adapter(tmp_path / "out/pytorch_lora_weights.safetensors", prefix="unet")
    assert_same(deltas(unet), factors)


def test_diffusers_loads_a_kohya_file_and_its_alpha_is_the_rank(tmp_path):
    factors = make_factors()
    assert write(tmp_path, factors, "kohya") == ("lora.safetensors",)
    tensors = load_file(tmp_path / "out/lora.safetensors")
    assert {float(tensors[name]) for name in tensors if name.endswith(".alpha")} == {2.0, 5.0}
    unet = make_unet()
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
        tmp_path / "out/lora.safetensors", unet_config=unet.config, return_lora_metadata=True
    )
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet, metadata=metadata)
    assert_same(deltas(unet), factors)


def test_peft_loads_its_own_folder(tmp_path):
    factors = make_factors()
    assert set(write(tmp_path, factors, "peft")) == {"adapter_model.safetensors", "adapter_config.json"}
    model = PeftModel.from_pretrained(make_unet(), tmp_path / "out")
    assert_same(deltas(model), factors)


@pytest.mark.parametrize("naming", ["diffusers", "kohya", "peft"])
def test_what_is_written_is_read_again_in_every_component(naming, tmp_path):
    module = "text_model.encoder.layers.0.self_attn.q_proj"
    text = [
        Factors(module, component, (), torch.randn(3, 8), torch.randn(8, 3))
        for component in ("text_encoder", "text_encoder_2")
    ]
    factors = [*make_factors(), *text]
    write(tmp_path, factors, naming)
    found = read_adapter(FolderModel(tmp_path / "out"))
    assert found.unmatched == ()
    assert len(found.modules) == len(factors)
    for part in factors:
        name = part.module if part.component == "unet" else f"{part.component}.{part.module}"
        again = found.modules[name]
        assert torch.allclose(again.up @ again.down, part.up @ part.down, rtol=0, atol=1e-5)


def test_a_single_text_encoder_has_kohya_s_first_name(tmp_path):
    module = "text_model.encoder.layers.0.self_attn.q_proj"
    write(tmp_path, [Factors(module, "text_encoder", (), torch.randn(3, 8), torch.randn(8, 3))], "kohya")
    assert all(name.startswith("lora_te_text_model") for name in load_file(tmp_path / "out/lora.safetensors"))


def test_half_precision_is_what_was_asked_for(tmp_path):
    factors = make_factors()
    write(tmp_path, factors, dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/pytorch_lora_weights.safetensors").values()} == {
        torch.float16
    }
    found = read_adapter(FolderModel(tmp_path / "out")).modules
    for part in factors:
        wanted = part.up.half().float() @ part.down.half().float()
        assert torch.allclose(found[part.module].up @ found[part.module].down, wanted, atol=1e-5)


def test_whole_differences_of_weights_and_biases_are_written_and_metadata_is_kept(tmp_path):
    with LocalContext(tmp_path) as context:
        writer = AdapterWriter(context, "diffusers", torch.float32, {"mine": "kept"}, {"unet"})
        writer.add_difference("unet", "mid_block.proj", "weight", torch.ones(2, 3))
        writer.add_difference("unet", "mid_block.proj", "bias", torch.ones(2))
        [path] = writer.close()
    with safe_open(tmp_path / "out" / path, framework="pt") as file:
        assert set(file.keys()) == {"unet.mid_block.proj.diff", "unet.mid_block.proj.diff_b"}
        assert file.metadata() == {"format": "pt", "mine": "kept"}


def test_a_name_whose_dots_are_unknown_is_refused(tmp_path):
    flat = Factors("strange_module", "", (), torch.randn(2, 4), torch.randn(4, 2), restored=False)
    with pytest.raises(UsageError, match="strange_module"):
        write(tmp_path, [flat])


def test_the_metadata_tells_rank_and_alpha_of_every_module(tmp_path):
    write(tmp_path, make_factors())
    with safe_open(tmp_path / "out/pytorch_lora_weights.safetensors", framework="pt") as file:
        fields = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (fields["unet.r"], fields["unet.lora_alpha"]) == (2, 2)
    assert fields["unet.rank_pattern"] == {"^down_blocks.0.resnets.0.conv1": 5}


def test_its_configuration_is_peft_s(tmp_path):
    write(tmp_path, make_factors((3, 3, 3)), "peft")
    fields = json.loads((tmp_path / "out/adapter_config.json").read_text("utf-8"))
    config = LoraConfig(**fields)
    assert (config.r, config.lora_alpha) == (3, 3)
    get_peft_model(make_unet(), config)
