"""Models of a few kilobytes with the names and shapes of real ones, to run plugins on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from modelgrove_hub.contracts import InputModel, Kind
from modelgrove_hub.store.writer import SafetensorsWriter
from modelgrove_hub.testing.local import FolderModel

if TYPE_CHECKING:
    from torch import Generator, Tensor

_ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"
_WIDTHS = {
    f"{_ATTENTION}.attn1.to_q": (64, 96),
    f"{_ATTENTION}.attn2.to_k": (64, 48),
    "mid_block.attentions.0.proj_in": (96, 96),
}
_CONCEPTS = ("a red apple", "a sleeping cat", "a sailing boat", "a snowy mountain")


def tiny_inputs(kind: Kind, folder: Path) -> list[InputModel] | None:
    """Inputs for a plugin of this kind: a network, two to compare, two LoRAs to merge, or LoRAs with cards.

    None for kinds that need more than random weights.
    """
    if kind is Kind.MERGER:
        return [_lora(folder / f"lora-{seed}", seed) for seed in range(2)]
    if kind is Kind.EMBEDDER:
        return [_lora(folder / f"lora-{seed}", seed, _CONCEPTS[seed % len(_CONCEPTS)]) for seed in range(8)]
    if kind is Kind.ANALYZER:
        return [_network(folder / "network"), _network(folder / "relative", changed=True)]
    if kind in (Kind.COMPRESSOR, Kind.EDITOR, Kind.VERIFIER):
        return [_network(folder / "network")]
    return None


def _network(folder: Path, *, changed: bool = False) -> InputModel:
    """Linear layers, convolutions, norms, biases and an integer buffer, as half of a UNet has them."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tensors = {
        "conv_in.weight": _random((16, 4, 3, 3), generator),
        "conv_in.bias": _random((16,), generator),
        "down_blocks.0.resnets.0.norm1.weight": torch.ones(16),
        "down_blocks.0.resnets.0.conv1.weight": _random((64, 16, 3, 3), generator),
        **{f"{name}.weight": _random(shape, generator) for name, shape in _WIDTHS.items()},
        "position_ids": torch.arange(16),
    }
    if changed:
        tensors["conv_in.weight"] = tensors["conv_in.weight"] + _random((16, 4, 3, 3), generator) * 0.1
    with SafetensorsWriter(folder / "diffusion_pytorch_model.safetensors", {"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}), "utf-8")
    return FolderModel(folder)


def _lora(folder: Path, seed: int, concept: str = "") -> InputModel:
    """A LoRA of rank 4 in diffusers' naming; with a concept it has a card that names it."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with SafetensorsWriter(folder / "pytorch_lora_weights.safetensors", {"format": "pt"}) as writer:
        for name, (out, width) in _WIDTHS.items():
            writer.add(f"unet.{name}.lora_A.weight", _random((4, width), generator))
            writer.add(f"unet.{name}.lora_B.weight", _random((out, 4), generator))
    if concept:
        (folder / "README.md").write_text(f"# {concept}\n\nA LoRA that draws {concept}.\n", "utf-8")
    return FolderModel(folder, adapter_type="lora")


def _random(shape: tuple[int, ...], generator: Generator) -> Tensor:
    import torch

    return torch.randn(shape, generator=generator) * 0.05
