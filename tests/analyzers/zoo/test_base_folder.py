import json

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from modelgrove_analyzers.zoo.base import SCHEDULER, UNET
from modelgrove_analyzers.zoo.base_folder import load_base, open_base, read_checkpoint, write_base
from modelgrove_hub.errors import CorruptFileError, NotFoundError
from modelgrove_hub.formats.card import read_card
from modelgrove_kernels.codec import LinearCodec


def test_a_base_comes_back_in_float32_with_float16_weights(tiny, tmp_path):
    write_base(tiny, {"steps": 10}, tmp_path)
    unet, noise, codec = load_base(tmp_path)
    for name, tensor in tiny.unet.state_dict().items():
        loaded = unet.state_dict()[name]
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded, tensor.half().float())
    assert torch.equal(codec.encoder, tiny.codec.encoder)
    assert noise.config.prediction_type == "v_prediction"
    assert torch.equal(noise.alphas_cumprod, tiny.noise.alphas_cumprod)
    # Writing must not have rounded the model in memory.
    assert tiny.unet.dtype == torch.float32


def test_diffusers_reads_the_parts_and_the_index_names_them(tiny, tmp_path):
    write_base(tiny, {"steps": 10}, tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "ZooPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["text_encoder_name"] == "all-MiniLM-L6-v2"
    assert UNet2DConditionModel.from_pretrained(tmp_path / "unet").config.cross_attention_dim == 384
    assert DDPMScheduler.from_pretrained(tmp_path / "scheduler").config.beta_schedule == SCHEDULER["beta_schedule"]
    stored = load_file(tmp_path / "unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    card = read_card({"README.md": tmp_path / "README.md"})
    assert card.licence == "cc-by-4.0"
    assert '"steps": 10' in card.text


def test_a_folder_with_a_missing_part_is_refused(tiny, tmp_path):
    write_base(tiny, {}, tmp_path)
    (tmp_path / "codec/codec.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"no codec/codec\.safetensors"):
        load_base(tmp_path)


def test_a_codec_of_another_width_is_refused(tiny, tmp_path):
    write_base(tiny, {}, tmp_path)
    wider = LinearCodec.fit(torch.rand(20, 3, 32, 32) * 2 - 1, 6)
    save_file(wider.tensors(), tmp_path / "codec/codec.safetensors")
    with pytest.raises(CorruptFileError, match="4 latent channels, the codec 6"):
        load_base(tmp_path)


def test_a_base_in_training_opens_at_its_average(tiny, tmp_path):
    unet = UNet2DConditionModel(in_channels=4, out_channels=4, **UNET)
    average = {name: p.detach() + 1 for name, p in unet.named_parameters()}
    state = {"average": average, "codec": tiny.codec.tensors(), "step": 250, "recipe": json.dumps({"steps": 500})}
    torch.save(state, tmp_path / "checkpoint.pt")
    base, recipe = read_checkpoint(tmp_path / "checkpoint.pt")
    assert recipe == {"steps": 500, "step": 250}
    assert torch.equal(open_base(tmp_path).unet.conv_in.weight, average["conv_in.weight"])
    assert base.codec.channels == 4


def test_no_checkpoint_says_what_writes_one(tmp_path):
    with pytest.raises(NotFoundError, match="modelgrove zoo train"):
        read_checkpoint(tmp_path / "checkpoint.pt")
