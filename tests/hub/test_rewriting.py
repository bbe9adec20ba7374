"""A model written anew is whole: every component in its file, configurations beside it. The guide's snippet is run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelgrove_hub.errors import DataError
from modelgrove_hub.rewriting import rewrite
from modelgrove_hub.testing import FolderModel, LocalContext

GUIDE = Path(__file__).parents[2] / "docs/plugins.md"


@pytest.fixture
def pipeline(tmp_path):
    """Two components that name a tensor alike, a configuration, a card and a pickle."""
    folder = tmp_path / "pipeline"
    for part, value in (("unet", 1.0), ("vae", 2.0)):
        (folder / part).mkdir(parents=True)
        save_file({"conv_in.weight": torch.full((2, 2), value)}, folder / part / "model.safetensors")
        (folder / part / "config.json").write_text("{}")
    (folder / "README.md").write_text("# a card")
    (folder / "unet/old.bin").write_bytes(b"no safetensors")
    return FolderModel(folder)


def test_tensors_of_components_have_names_of_their_own(pipeline):
    tensors = list(pipeline.tensors())
    assert [tensor.name for tensor in tensors] == ["unet/conv_in.weight", "vae/conv_in.weight"]
    assert {tensor.key for tensor in tensors} == {"conv_in.weight"}
    assert [tensor.file for tensor in tensors] == ["unet/model.safetensors", "vae/model.safetensors"]
    assert [tensor.read()[0, 0].item() for tensor in tensors] == [1.0, 2.0]


def test_the_guides_snippet_writes_a_whole_model(pipeline, tmp_path):
    snippet = re.findall(r"```python\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)[1]
    names: dict = {}
    exec(compile(snippet, "docs/plugins.md", "exec"), names)
    with LocalContext(tmp_path / "run", [pipeline]) as context:
        result = names["run"](None, context, None)
    written = {path.relative_to(context.out).as_posix() for path in context.out.rglob("*") if path.is_file()}
    assert written == {"unet/model.safetensors", "unet/config.json", "vae/model.safetensors", "vae/config.json"}
    assert set(result.outputs[0].files) == written
    weight = load_file(context.out / "vae/model.safetensors")["conv_in.weight"]
    assert weight.dtype == torch.float16
    assert weight.tolist() == [[2.0, 2.0], [2.0, 2.0]]


def test_a_model_without_safetensors_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with LocalContext(tmp_path / "run") as context, pytest.raises(DataError, match="no safetensors file"):
        rewrite(context, FolderModel(tmp_path / "model.gguf"), lambda tensor: tensor.read())
