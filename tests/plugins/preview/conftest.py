"""A tiny zoo pipeline and LoRAs on disk, and a way to paint with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file

from modelgrove_hub.search.text import SPACE, WIDTH
from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_kernels.codec import LinearCodec
from modelgrove_plugins.preview.diffusers import PICTURE, DiffusersPreviewer

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0"


@pytest.fixture(scope="session")
def zoo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the zoo's base, untrained: 16×16 pictures through 4×4×6 latents."""
    folder = tmp_path_factory.mktemp("zoo")
    torch.manual_seed(0)
    codec = LinearCodec.fit(torch.rand(32, 3, 16, 16) * 2 - 1, channels=6)
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=6, out_channels=6, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip
    unet.half().save_pretrained(folder / "unet")
    DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False).save_pretrained(
        folder / "scheduler"
    )
    (folder / "codec").mkdir()
    save_file(codec.tensors(), folder / "codec/codec.safetensors")
    index = {"_class_name": "ZooPipeline", "text_encoder_name": SPACE, "unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def zoo(zoo_folder: Path) -> FolderModel:
    """The tiny pipeline as a registered model."""
    return FolderModel(zoo_folder, name="tiny-zoo", family="zoo")


@pytest.fixture
def lora(tmp_path: Path) -> Callable[..., FolderModel]:
    """Write a LoRA on two attention layers of the tiny pipeline; `kohya` flattens its names."""

    def write(
        name: str, *, seed: int = 1, size: float = 1.0, kohya: bool = False, layers: tuple[str, ...] = ()
    ) -> FolderModel:
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for layer in layers or (f"{ATTENTION}.attn1.to_q", f"{ATTENTION}.attn2.to_k"):
            width = WIDTH if "attn2.to_k" in layer else 32
            down = torch.randn(4, width, generator=generator)
            up = size * torch.randn(32, 4, generator=generator)
            if kohya:
                stem = f"lora_unet_{layer.replace('.', '_')}"
                tensors |= {
                    f"{stem}.lora_down.weight": down,
                    f"{stem}.lora_up.weight": up,
                    f"{stem}.alpha": torch.tensor(4.0),
                }
            else:
                tensors |= {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "pytorch_lora_weights.safetensors")
        return FolderModel(folder, name=name, adapter_type="lora")

    return write


@pytest.fixture
def paint(tmp_path: Path) -> Callable[..., tuple[bytes, dict[str, Any]]]:
    """Preview models; returns the PNG's bytes and the report."""

    def run(*models: FolderModel, **params: Any) -> tuple[bytes, dict[str, Any]]:
        with TemporaryDirectory(dir=tmp_path) as folder:
            values = {"prompts": ["a red apple"], "steps": 2, **params}
            result = run_plugin(DiffusersPreviewer(), models, Path(folder) / "run", values)
            return (Path(folder) / "run/out" / PICTURE).read_bytes(), dict(result.report)

    return run
