"""The real client, in a cache of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from huggingface_hub import HfApi, constants
from safetensors.torch import save_file

MODULE = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture(scope="module")
def patched() -> Iterator[pytest.MonkeyPatch]:
    """Changes that last as long as the module's tests."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def api(server, patched, tmp_path_factory) -> HfApi:
    """`HfApi` of the server; functions of the package, and commands, go there too."""
    cache = tmp_path_factory.mktemp("cache")
    patched.setattr(constants, "ENDPOINT", server.url)
    patched.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    patched.setattr(constants, "HF_HUB_CACHE", str(cache))
    patched.setattr(constants, "HF_XET_CACHE", str(cache / "xet"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):  # what other tests' commands set in this process
        patched.delenv(name, raising=False)
    for name, value in {"HF_ENDPOINT": server.url, "HF_HOME": cache, "HF_XET_CACHE": cache / "xet"}.items():
        patched.setenv(name, str(value))
    return HfApi(endpoint=server.url)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA in a file; each seed gives another one."""
    folder = tmp_path_factory.mktemp("loras")

    def lora(seed=0):
        generator = torch.Generator().manual_seed(seed)
        down, up = (torch.randn(shape, generator=generator) for shape in ((4, 64), (64, 4)))
        file = folder / f"lora-{seed}.safetensors"
        tensors = {f"{MODULE}.lora_down.weight": down, f"{MODULE}.lora_up.weight": up}
        save_file({**tensors, f"{MODULE}.alpha": torch.tensor(4.0)}, file)
        return file

    return lora
