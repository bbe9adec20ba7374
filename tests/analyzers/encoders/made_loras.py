"""Families of made-up LoRAs: every word moves outputs in its own directions, whatever the nuisance."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from modelgrove_hub.testing import FolderModel

MODULES = tuple(
    f"down_blocks.1.attentions.0.transformer_blocks.0.attn{a}.to_{p}" for a in (1, 2) for p in ("q", "k", "v")
)
OUT, IN = 48, 32
COLOURS, ANIMALS = ("red", "green", "blue", "yellow"), ("cat", "horse", "fish", "owl")
HELD_OUT = ("red cat", "green horse", "blue fish")
Factors = dict[str, tuple[Tensor, Tensor]]


def concept_factors(text: str, seed: int, rank: int = 4, noise: float = 0.5) -> Factors:
    """Factors (down, up) by module: through a random A, each word of `text` writes its own direction."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for number, module in enumerate(MODULES):
        down = torch.randn(rank, IN, generator=generator) / IN**0.5
        up = noise * torch.randn(OUT, rank, generator=generator) / OUT**0.5
        for word in text.split():
            own = torch.Generator().manual_seed(100 * sum(map(ord, word)) + number)
            direction = torch.randn(OUT, generator=own) / OUT**0.5
            up += 2 * direction[:, None] * torch.randn(rank, generator=generator)
        factors[module] = (down, up)
    return factors


def regauge(factors: Factors, seed: int) -> Factors:
    """The same updates from other factors: (A, B) → (RA, BR⁻¹) for a random invertible R."""
    generator = torch.Generator().manual_seed(seed)
    changed = {}
    for module, (down, up) in factors.items():
        R = torch.randn(len(down), len(down), generator=generator, dtype=torch.float64)
        R += 3 * torch.eye(len(down), dtype=torch.float64)
        changed[module] = ((R @ down.double()).float(), (up.double() @ torch.linalg.inv(R)).float())
    return changed


def save_diffusers(folder: Path, factors: Factors, half: bool = False) -> FolderModel:
    tensors = {
        f"unet.{module}.lora_{side}.weight": tensor
        for module, pair in factors.items()
        for side, tensor in zip("AB", pair, strict=True)
    }
    return _save(folder, "pytorch_lora_weights.safetensors", tensors, half)


def save_peft(folder: Path, factors: Factors, alpha: float) -> FolderModel:
    """With alpha ≠ rank in the configuration, and `up` scaled such that the update stays the same."""
    rank = len(next(iter(factors.values()))[0])
    tensors = {}
    for module, (down, up) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up * rank / alpha
    _save(folder, "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": alpha}))
    return FolderModel(folder)


def save_kohya(folder: Path, factors: Factors, alpha: float) -> FolderModel:
    """With alpha ≠ rank beside the factors, and `up` scaled such that the update stays the same."""
    tensors = {}
    for module, (down, up) in factors.items():
        flat = f"lora_unet_{module.replace('.', '_')}"
        tensors[f"{flat}.alpha"] = torch.tensor(alpha)
        tensors[f"{flat}.lora_down.weight"] = down
        tensors[f"{flat}.lora_up.weight"] = up * len(down) / alpha
    return _save(folder, "lora.safetensors", tensors)


def document(model: FolderModel, text: str) -> FolderModel:
    """The model, with a card that says what it draws."""
    folder = next(iter(model.paths.values())).parent
    tags = f"tags: [lora, {', '.join(text.split())}]"
    (folder / "README.md").write_text(f"---\n{tags}\n---\n# x\n\nThis draws a {text}.\n")
    return FolderModel(folder, adapter_type="lora")


def family(folder: Path, each: int = 2) -> list[FolderModel]:
    """Documented LoRAs of thirteen pairs of a colour and an animal, `each` of every pair that is not held out."""
    texts = [f"{colour} {animal}" for colour in COLOURS for animal in ANIMALS]
    return [
        document(save_diffusers(folder / f"{text}-{k}", concept_factors(text, 100 * number + k)), text)
        for number, text in enumerate(texts)
        if text not in HELD_OUT
        for k in range(each)
    ]


def _save(folder: Path, name: str, tensors: dict[str, Tensor], half: bool = False) -> FolderModel:
    folder.mkdir(parents=True)
    save_file({key: (t.half() if half else t).contiguous() for key, t in tensors.items()}, folder / name)
    return FolderModel(folder, adapter_type="lora")
