"""The text space against the arithmetic of its paper: mean of the last hidden states, length one."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from modelgrove_hub.errors import UsageError
from modelgrove_hub.search.text import SPACE, TOKENS, WIDTH, embed_texts, model_folder, text_space, token_states
from modelgrove_hub.settings import settings

TEXTS = ["a king's crown", "", "  A Cat\twith UPPER case ", "naïve café 漢字 🍎", "word " * 400]
LONGEST = 256
ROUNDING = 1e-5
"""Both compute in float32, padded to other lengths: sums of 384 products in another order, six layers deep."""


@pytest.fixture(scope="module")
def hidden_states():
    """Text and limit → last hidden states (t, 384), by transformers alone, one text at a time."""
    from transformers import AutoTokenizer, BertModel

    tokenizer = AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)
    network = BertModel.from_pretrained(model_folder(), local_files_only=True).eval()

    def states(text, longest):
        with torch.no_grad():
            tokens = tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
            return network(**tokens).last_hidden_state[0]

    return states


def test_sentence_vectors_are_mean_states_of_length_one(hidden_states):
    vectors = embed_texts(TEXTS)
    assert vectors.dtype == np.float32
    wanted = torch.stack([hidden_states(text, LONGEST).mean(0) for text in TEXTS])
    np.testing.assert_allclose(vectors, torch.nn.functional.normalize(wanted, dim=1), atol=ROUNDING)


def test_token_states_are_cut_and_padded_with_zeros(hidden_states):
    states = token_states(TEXTS)
    assert states.shape == (len(TEXTS), TOKENS, WIDTH)
    for text, found in zip(TEXTS, states, strict=True):
        wanted = hidden_states(text, TOKENS)
        torch.testing.assert_close(found[: len(wanted)], wanted, atol=10 * ROUNDING, rtol=0)  # states are up to 10 long
        assert not found[len(wanted) :].any()


def test_states_can_be_trained_with():
    weight = torch.ones(WIDTH, requires_grad=True)
    (token_states(["a cat"]) * weight).sum().backward()
    assert weight.grad is not None


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A real CLIP of real classes, only tiny and untrained: the network, its tokenizer and the folder of both."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(0)
    pieces = [letter + end for letter in "abcdeghilnoprstu" for end in ("", "</w>")]
    letters = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = CLIPTokenizer(letters | {"<|startoftext|>": 98, "<|endoftext|>": 99}, [], model_max_length=77)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 100, "bos_token_id": 98, "eos_token_id": 99}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    folder = tmp_path_factory.mktemp("models") / "tiny clip"
    network.save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(folder)
    return network, tokenizer, folder


@pytest.fixture
def chosen(monkeypatch):
    """Chooses a text encoder for this test."""

    def forget():
        settings.cache_clear()
        text_space.cache_clear()

    def choose(folder):
        monkeypatch.setenv("MODELGROVE_TEXT_ENCODER", str(folder))
        forget()

    yield choose
    monkeypatch.undo()
    forget()


def test_clip_reads_texts_as_its_own_text_side_does(clip, chosen):
    network, tokenizer, folder = clip
    chosen(folder)
    with torch.no_grad():
        wanted = network.get_text_features(**tokenizer(["a red apple"], return_tensors="pt")).pooler_output
    found = embed_texts(["a red apple", "a boat"])
    assert found.shape == (2, 24)
    np.testing.assert_allclose(found[:1], torch.nn.functional.normalize(wanted, dim=1), atol=ROUNDING)


def test_a_space_is_named_after_its_encoder_and_version(clip, chosen, tmp_path):
    assert text_space() == SPACE
    chosen(clip[2])
    name = text_space()
    assert name.startswith("tiny-clip-")
    other = shutil.copytree(clip[2], tmp_path / "tiny clip")
    chosen(other)
    assert text_space() == name
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    chosen(other)
    assert text_space() != name


def test_the_zoo_reads_captions_as_it_always_did(clip, chosen):
    before = token_states(["a cat"])
    chosen(clip[2])
    torch.testing.assert_close(token_states(["a cat"]), before)


def test_a_folder_without_a_model_is_refused(chosen, tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        chosen(folder)
        with pytest.raises(UsageError, match="text_encoder"):
            embed_texts(["a cat"])
    (tmp_path / "config.json").write_text("{}")
    chosen(tmp_path)
    with pytest.raises(UsageError, match="cannot be opened"):
        embed_texts(["a cat"])


def test_each_space_has_its_own_vectors(clip, tmp_path):
    """A hub that is asked in another space embeds its cards anew, and finds the old vectors when it comes back."""

    def modelgrove(*arguments, encoder=None):
        environment = {**os.environ, **({"MODELGROVE_TEXT_ENCODER": str(encoder)} if encoder else {})}
        command = [sys.executable, "-m", "modelgrove_hub", "--home", str(tmp_path / "hub"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return json.loads(done.stdout) if "--json" in arguments else None

    (tmp_path / "model").mkdir()
    (tmp_path / "model/README.md").write_text("---\ntags: [lora]\n---\nA LoRA that draws a red apple.\n")
    factors = {"lora_A": torch.ones(2, 8), "lora_B": torch.ones(8, 2)}
    save_file(
        {f"unet.down_blocks.0.attn1.to_q.{name}.weight": tensor for name, tensor in factors.items()},
        tmp_path / "model/apple.safetensors",
    )
    modelgrove("init")
    modelgrove("ingest", str(tmp_path / "model"))
    for encoder, made in ((None, 1), (clip[2], 1), (None, 0)):
        assert modelgrove("expert", "embed", "--json", encoder=encoder)["cards"] == made
    assert len(modelgrove("search", "apple", "--json", encoder=clip[2])["hits"]) == 1
