from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modelgrove_hub.hub import Hub
from modelgrove_hub.settings import Settings
from modelgrove_migrations.run import upgrade


@pytest.fixture
def home(tmp_path):
    """An empty hub on SQLite; which database it is makes no difference to ingestion."""
    hub = Hub.open(Settings(home=tmp_path / "hub"))
    upgrade(hub.settings.database)
    yield hub
    hub.engine.dispose()


@pytest.fixture
def lora(tmp_path):
    """Write a LoRA of the zoo's base in the diffusers convention, as a real trainer would."""

    def write(path: Path, seed: int = 0, rank: int = 4, metadata: dict[str, str] | None = None) -> Path:
        generator = torch.Generator().manual_seed(seed)
        stem = "unet.mid_block.attentions.0.transformer_blocks.0"
        tensors = {}
        for layer, width in (("attn1.to_q", 160), ("attn1.to_v", 160), ("attn2.to_k", 384), ("attn2.to_v", 384)):
            tensors[f"{stem}.{layer}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
            tensors[f"{stem}.{layer}.lora_B.weight"] = torch.randn(160, rank, generator=generator)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata)
        return path

    return write
