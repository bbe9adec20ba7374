"""Tiny networks on disk, as registered models, and a context to compare them in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from modelgrove_analyzers.heritage.facts import Facts, facts_of
from modelgrove_hub.contracts import InputModel, Plugin
from modelgrove_hub.registry.inputs import RegisteredModel
from modelgrove_hub.testing import run_plugin
from modelgrove_plugins.compress.rtn import Rtn

Weights = dict[str, Tensor]
SaveModel = Callable[..., RegisteredModel]


@pytest.fixture
def network() -> Callable[[int], Weights]:
    """Weights of a small network, another one for each seed: 8 matrices, a convolution, biases, norms."""

    def build(seed: int = 0) -> Weights:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator) * 0.05

        weights = {f"blocks.{i}.attn1.{name}.weight": draw(96, 96) for i in range(4) for name in ("to_q", "to_k")}
        weights |= {f"blocks.{i}.ff.bias": draw(96) for i in range(4)}
        weights |= {f"blocks.{i}.norm.weight": torch.ones(96) for i in range(4)}
        return weights | {"conv_in.weight": draw(32, 24, 3, 3)}

    return build


@pytest.fixture
def save(tmp_path: Path) -> SaveModel:
    """Write weights as a one-file model; revisions are numbered in the order of writing."""
    written: list[str] = []

    def save_model(
        name: str, weights: Weights, *, metadata: Mapping[str, str] | None = None, adapter_type: str | None = None,
        folder: str = "",
    ) -> RegisteredModel:  # fmt: skip
        path = tmp_path / name / "model.safetensors"
        path.parent.mkdir()
        save_file({key: tensor.contiguous() for key, tensor in weights.items()}, path, metadata=dict(metadata or {}))
        written.append(name)
        inside = f"{folder}/model.safetensors" if folder else "model.safetensors"
        return RegisteredModel(name, "tiny", adapter_type, len(written), {}, "", (), {inside: path})

    return save_model


@pytest.fixture(scope="session")
def facts_from(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, Weights], Facts]:
    """Measure weights as a one-file model."""

    def measure(name: str, revision_id: int, weights: Weights) -> Facts:
        folder = tmp_path_factory.mktemp(name)
        save_file(weights, folder / "model.safetensors")
        model = RegisteredModel(
            name, "tiny", None, revision_id, {}, "", (), {"model.safetensors": folder / "model.safetensors"}
        )
        return facts_of(model, folder)

    return measure


@pytest.fixture
def pack(tmp_path: Path) -> Callable[..., RegisteredModel]:
    """Compress a model, with the rtn plugin if no other is named; the result is the latest revision."""

    def run(model: RegisteredModel, name: str, plugin: Plugin | None = None, **params: Any) -> RegisteredModel:
        run_plugin(plugin or Rtn(), [model], tmp_path / name, {"smallest": 0, "skip": [], **params})
        path = tmp_path / name / "out/model.safetensors"
        return RegisteredModel(name, "tiny", None, 1000, {}, "", (), {"model.safetensors": path})

    return run


@pytest.fixture
def analyze(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run an analyzer on models and return its report."""

    def run(analyzer: Any, *models: InputModel, **params: Any) -> dict[str, Any]:
        with TemporaryDirectory(dir=tmp_path) as folder:
            return dict(run_plugin(analyzer, models, Path(folder), params).report)

    return run
