"""Tools that people already use, with nothing but `HF_ENDPOINT` set: each in a process of its own, as they would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from socket import create_connection, create_server

import pytest

from modelgrove_hub.search.text import model_folder

PIPELINE = """
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel, AutoencoderKL, DDIMScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
words = ("a", "b", "o", "t", "<|startoftext|>", "<|endoftext|>")
vocabulary = {word + end: i * 2 + j for i, word in enumerate(words) for j, end in enumerate(("", "</w>"))}
vocabulary |= {"<|startoftext|>": 98, "<|endoftext|>": 99}
pipe = StableDiffusionPipeline(
    vae=AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=16),
    text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=100, hidden_size=16, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2)),
    tokenizer=CLIPTokenizer(vocabulary, [], model_max_length=77),
    unet=UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16,
        attention_head_dim=2, norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")),
    scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1), safety_checker=None,
    feature_extractor=None, requires_safety_checker=False,
)
"""
PUSH = PIPELINE + "pipe.push_to_hub('me/tiny-sd')\n"
LORA = """
import sys, torch
from peft import LoraConfig
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
pipe = DiffusionPipeline.from_pretrained("me/tiny-sd")
pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
state = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
StableDiffusionPipeline.save_lora_weights(sys.argv[1], unet_lora_layers=state)
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("me/tiny-lora")
api.upload_folder(repo_id="me/tiny-lora", folder_path=sys.argv[1])
again = DiffusionPipeline.from_pretrained("me/tiny-sd")
again.load_lora_weights("me/tiny-lora")
print(again.get_active_adapters())
"""
SENTENCES = """
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer
print(SentenceTransformer("me/minilm").encode("a cat").shape)
print(type(AutoModel.from_pretrained("me/minilm")).__name__)
print(len(AutoTokenizer.from_pretrained("me/minilm")("a cat").input_ids))
"""


@pytest.fixture(scope="module")
def python(server, tmp_path_factory):
    """Run a script as somebody would who set `HF_ENDPOINT` and nothing else."""
    home = tmp_path_factory.mktemp("hf")

    def python(script, *arguments, endpoint=server.url):
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MODELGROVE_"))}
        environment = {**clean, "HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
        command = [sys.executable, "-c", script, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return python


def test_diffusers_pushes_and_loads_pipelines_and_loras(python, server, tmp_path):
    python(PUSH)
    assert "default_0" in python(LORA, tmp_path / "lora")
    kinds = {line.split()[0]: line.split()[1:3] for line in server.run("ls").splitlines()[1:]}
    assert "me/tiny-sd" in kinds
    assert kinds["me/tiny-lora"] == ["adapter", "unknown"]  # of a network that is smaller than any family's


def test_transformers_and_sentence_transformers_load(python, server, tmp_path):
    shutil.copytree(model_folder(), tmp_path / "me/minilm")
    server.run("ingest", str(tmp_path))
    assert python(SENTENCES).split() == ["(384,)", "BertModel", "4"]


class Cutting:
    """A proxy that passes `first` bytes of the first answer with a body that long, and then hangs up, once."""

    def __init__(self, host: str, port: int, first: int) -> None:
        self.left, self.cut = first, False
        self._there = (host, port)
        self._listening = create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            far = create_connection(self._there)
            threading.Thread(target=self._pass, args=(near, far, False), daemon=True).start()
            threading.Thread(target=self._pass, args=(far, near, True), daemon=True).start()

    def _pass(self, source, target, counted) -> None:
        try:
            while data := source.recv(65536):
                if counted and not self.cut:
                    data, self.left = data[: max(0, self.left)], self.left - len(data)
                    if self.left < 0:
                        self.cut = True
                        target.sendall(data)
                        break
                target.sendall(data)
        except OSError:
            pass
        finally:
            source.close()
            target.close()

    def close(self) -> None:
        self._listening.close()


def test_a_download_goes_on_where_the_connection_was_cut(python, server, tmp_path):
    import torch
    from safetensors.torch import save_file

    (tmp_path / "me").mkdir()
    save_file({"weight": torch.rand(2**20)}, tmp_path / "me/big.safetensors")
    server.run("ingest", str(tmp_path))
    host, port = server.url.removeprefix("http://").split(":")
    proxy = Cutting(host, int(port), 2**21)
    try:
        script = "from huggingface_hub import hf_hub_download as get; print(get('me/big', 'big.safetensors'))"
        place = Path(python(script, endpoint=proxy.url).strip())
    finally:
        proxy.close()
    assert proxy.cut
    assert place.read_bytes() == (tmp_path / "me/big.safetensors").read_bytes()
