"""A tiny untrained zoo pipeline, as a folder."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file

from modelgrove_hub.search.text import SPACE, WIDTH
from modelgrove_hub.testing import FolderModel
from modelgrove_kernels.codec import LinearCodec


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> FolderModel:
    """16×16 pictures through 4×4×6 latents."""
    folder = tmp_path_factory.mktemp("zoo")
    torch.manual_seed(0)
    codec = LinearCodec.fit(torch.rand(32, 3, 16, 16) * 2 - 1, channels=6)
    UNet2DConditionModel(
        sample_size=4, in_channels=6, out_channels=6, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=2, norm_num_groups=8,
    ).half().save_pretrained(folder / "unet")  # fmt: skip
    DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False).save_pretrained(
        folder / "scheduler"
    )
    (folder / "codec").mkdir()
    save_file(codec.tensors(), folder / "codec/codec.safetensors")
    index = {"_class_name": "ZooPipeline", "text_encoder_name": SPACE, "unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return FolderModel(folder, name="tiny-zoo", family="zoo")
