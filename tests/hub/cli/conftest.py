"""A hub of its own for commands that run in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor

from modelgrove_hub.hub import Hub
from modelgrove_hub.ingest.pipeline import ingest


@pytest.fixture
def hub(own_hub: Hub) -> Hub:
    """The hub that the commands open."""
    return own_hub


@pytest.fixture
def register(hub: Hub, tmp_path: Path) -> Callable[..., str]:
    """Ingest weights as one file, or a folder that is there; returns the model's name."""

    def add(name: str, weights: dict[str, Tensor] | None = None, folder: Path | None = None) -> str:
        path = folder or tmp_path / f"{name}.safetensors"
        if weights is not None:
            save_file(weights, path)
        (found,) = ingest(hub, [path], "reference")
        assert found.outcome == "new", found.reason
        return found.name

    return add


@pytest.fixture
def run() -> Callable[..., Any]:
    """Run a command with `--json` and return what it prints; with `text` its lines instead."""

    def invoke(command: click.Command, *arguments: str, text: bool = False) -> Any:
        result = CliRunner().invoke(
            command, [*arguments, *([] if text else ["--json"])], catch_exceptions=False, standalone_mode=False
        )
        if result.exception:
            raise result.exception
        return result.stdout.splitlines() if text else json.loads(result.stdout)

    return invoke


@pytest.fixture
def network() -> Callable[[int], dict[str, Tensor]]:
    """Eight matrices of 64 × 64, others for each seed."""

    def build(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {f"blocks.{i}.attn.to_q.weight": torch.randn(64, 64, generator=generator) * 0.05 for i in range(8)}

    return build
