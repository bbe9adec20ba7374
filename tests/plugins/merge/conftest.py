"""LoRA files and checkpoints made for merging."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import modelgrove_analyzers
from modelgrove_hub.testing import FolderModel

SHAPES = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (64, 96),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (64, 48),
    "mid_block.resnets.0.conv1": (32, 24, 3, 3),
}

CHECKPOINT = {"conv_in.weight": (8, 4, 3, 3), "conv_in.bias": (8,), "proj.weight": (8, 8), "norm.weight": (8,)}
FILE = "diffusion_pytorch_model.safetensors"


class Maker:
    """Writes LoRA files and keeps the exact updates they stand for, in float64."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name, rank=4, seed=None, *, kohya=False, shapes: Mapping = SHAPES, dtype=torch.float32, **facts):
        generator = torch.Generator().manual_seed(hash_of(name) if seed is None else seed)
        tensors, updates = {}, {}
        for module, (out, width, *kernel) in shapes.items():
            down = (torch.randn(rank, width, *kernel, generator=generator) * 0.1).to(dtype)
            up = (torch.randn(out, rank, *(1 for _ in kernel), generator=generator) * 0.1).to(dtype)
            alpha = 2.0 if kohya else float(rank)
            updates[module] = (up.double().flatten(1) @ down.double().flatten(1)) * (alpha / rank)
            if kohya:
                stem = "lora_unet_" + module.replace(".", "_")
                tensors |= {
                    f"{stem}.lora_down.weight": down,
                    f"{stem}.lora_up.weight": up,
                    f"{stem}.alpha": torch.tensor(alpha),
                }
            else:
                tensors |= {f"unet.{module}.lora_A.weight": down, f"unet.{module}.lora_B.weight": up}
        return self.write(name, tensors, **facts), updates

    def write(self, name, tensors, metadata=None, **facts):
        (self.folder / name).mkdir(parents=True)
        path = self.folder / name / "pytorch_lora_weights.safetensors"
        save_file(tensors, path, metadata)
        return FolderModel(path, name=name, adapter_type="lora", **facts)


def hash_of(name):
    return sum(place * ord(letter) for place, letter in enumerate(name, 1))


@pytest.fixture
def make(tmp_path):
    return Maker(tmp_path / "inputs")


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a checkpoint of random weights; with `start` and `step` they are step times random away from another's."""

    def write(name, seed, dtype=torch.float32, start=None, step=1.0, **more):
        generator = torch.Generator().manual_seed(seed)
        tensors = {key: step * torch.randn(shape, generator=generator) for key, shape in CHECKPOINT.items()}
        if start is not None:
            origin = load_file(start.files()[FILE])
            tensors = {key: origin[key] + tensor for key, tensor in tensors.items()}
        tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()} | {"position_ids": torch.arange(4)}
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        save_file({**tensors, **more}, folder / FILE, {"format": "pt"})
        (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}', "utf-8")
        return FolderModel(folder, name=name)

    return write


@pytest.fixture
def values_of():
    """The floating-point tensors of a checkpoint or of a job's result, by name, in float64."""

    def read(place):
        path = place / "out" / FILE if isinstance(place, Path) else place.files()[FILE]
        return {key: tensor.double() for key, tensor in load_file(path).items() if tensor.is_floating_point()}

    return read


@pytest.fixture
def sample():
    """The zoo's base, and two of its LoRAs."""
    folder = Path(modelgrove_analyzers.__file__).parent / "zoo/data"
    names = ("whale-e07bb677", "crown-9e1f1047")
    loras = [FolderModel(folder / "sample" / name, name=name, adapter_type="lora") for name in names]
    return FolderModel(folder / "zoo-base", name="zoo-base"), loras
