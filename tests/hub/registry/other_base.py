"""A second base for the zoo's sample: every layer's outputs in another order, in the base and in its LoRAs alike.

Nothing that a LoRA of one says about outputs holds for the other, and all else is equal: an independently trained base
of the same architecture, without the training.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import modelgrove_analyzers.zoo
from modelgrove_hub.formats.adapter_keys import Role, flat, module_of, parse_key

DATA = Path(modelgrove_analyzers.zoo.__file__).parent / "data"
BASE, SAMPLE = DATA / "zoo-base", DATA / "sample"


def sample(count: int, start: int = 0) -> list[Path]:
    """Some LoRAs of the sample, of all conventions."""
    return [path for path in sorted(SAMPLE.iterdir()) if path.suffix != ".jsonl"][start : start + count]


def shuffled(source: Path, target: Path, seed: int = 0) -> Path:
    """A copy of a LoRA or a base as it would be on the base of that seed."""
    if source.is_dir():
        shutil.copytree(source, target)
        for file in target.rglob("*.safetensors"):
            if file.parent.name != "codec":
                _shuffle(file, file, seed)
        return target
    target = target.with_suffix(source.suffix)
    target.parent.mkdir(parents=True, exist_ok=True)
    _shuffle(source, target, seed)
    return target


def declare(folder: Path, base: str) -> Path:
    """Let a LoRA's card name its base."""
    (folder / "README.md").write_text(f"---\nbase_model: {base}\n---\n# A LoRA\n")
    return folder


def _shuffle(source: Path, target: Path, seed: int) -> None:
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
        tensors = {name: _rows(name, file.get_tensor(name), seed) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, target, metadata)


def _rows(name: str, tensor: Tensor, seed: int) -> Tensor:
    key = parse_key(name)
    if tensor.ndim < 2 or (key is not None and key.role is not Role.UP):
        return tensor
    layer = flat(key.target if key else module_of(name.removesuffix(".weight")))
    own = torch.Generator().manual_seed(sum(map(ord, layer)) + 1000 * (seed + 1) + len(json.dumps(layer)))
    return tensor[torch.randperm(len(tensor), generator=own)].contiguous()
