from __future__ import annotations

import json

import pytest

from modelgrove_hub.errors import NotFoundError
from modelgrove_hub.ingest.discover import discover


def touch(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def found(path):
    return [(item.name, sorted(item.files)) for item in discover(path)]


def test_a_lone_file_comes_with_its_side_cars(tmp_path):
    touch(tmp_path / "styles/ink.safetensors")
    touch(tmp_path / "styles/ink.md")
    touch(tmp_path / "styles/ink.png")
    touch(tmp_path / "styles/other.safetensors")
    assert found(tmp_path) == [
        ("styles/ink", ["ink.md", "ink.png", "ink.safetensors"]),
        ("styles/other", ["other.safetensors"]),
    ]


def test_a_signature_beside_a_model_is_no_file_of_it(tmp_path):
    touch(tmp_path / "me/pipe/model_index.json", "{}")
    touch(tmp_path / "me/pipe/model.sig")
    touch(tmp_path / "me/pipe/unet/model.sig")
    touch(tmp_path / "one/ink.safetensors")
    touch(tmp_path / "one/model.sig")
    touch(tmp_path / "two/ink.safetensors")
    touch(tmp_path / "two/oil.safetensors")
    touch(tmp_path / "two/model.sig")  # over which of them?

    items = {item.name: (sorted(item.files), item.signature) for item in discover(tmp_path)}

    assert items == {
        "me/pipe": (["model_index.json", "unet/model.sig"], tmp_path / "me/pipe/model.sig"),
        "one/ink": (["ink.safetensors"], tmp_path / "one/model.sig"),
        "two/ink": (["ink.safetensors"], None),
        "two/oil": (["oil.safetensors"], None),
    }


@pytest.mark.parametrize("mark", ["model_index.json", "ink.txt"])
def test_a_signature_that_is_a_link_out_of_the_folder_is_refused(tmp_path, mark):
    outside = touch(tmp_path / "outside.sig")
    touch(tmp_path / "in/ink.safetensors")
    touch(tmp_path / "in" / mark, "{}")
    (tmp_path / "in/model.sig").symlink_to(outside)

    (item,) = discover(tmp_path / "in")

    assert item.refused.startswith("model.sig is a link to")


def test_a_diffusers_folder_is_one_model(tmp_path):
    touch(tmp_path / "me/pipe/model_index.json", "{}")
    touch(tmp_path / "me/pipe/unet/diffusion_pytorch_model.safetensors")
    touch(tmp_path / "me/pipe/unet/config.json", "{}")
    files = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    assert found(tmp_path) == [("me/pipe", files)]


def test_a_sharded_model_is_one_model(tmp_path):
    touch(tmp_path / "big/model.safetensors.index.json", json.dumps({"weight_map": {}}))
    touch(tmp_path / "big/model-00001-of-00002.safetensors")
    touch(tmp_path / "big/model-00002-of-00002.safetensors")
    assert [name for name, _ in found(tmp_path)] == ["big"]


def test_a_card_makes_a_folder_with_one_weight_file_the_model(tmp_path):
    touch(tmp_path / "cat/README.md")
    touch(tmp_path / "cat/lora.safetensors")
    assert found(tmp_path) == [("cat", ["README.md", "lora.safetensors"])]


def test_a_card_beside_many_weight_files_does_not_join_them(tmp_path):
    touch(tmp_path / "README.md")
    touch(tmp_path / "a.safetensors")
    touch(tmp_path / "b.safetensors")
    assert [name for name, _ in found(tmp_path)] == ["a", "b"]


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    touch(tmp_path / ".cache/x.safetensors")
    touch(tmp_path / ".y.safetensors")
    assert found(tmp_path) == []


def test_a_link_inside_is_followed_and_one_that_leaves_is_refused(tmp_path):
    outside = touch(tmp_path / "outside/secret.safetensors")
    root = tmp_path / "root"
    inside = touch(root / "real/a.safetensors")
    (root / "good.safetensors").symlink_to(inside)
    (root / "bad.safetensors").symlink_to(outside)
    refused = {item.name: item.refused for item in discover(root)}
    assert refused["good"] == ""
    assert "outside" in refused["bad"]


def test_a_folder_link_is_not_walked_into(tmp_path):
    touch(tmp_path / "elsewhere/a.safetensors")
    root = tmp_path / "root"
    root.mkdir()
    (root / "loop").symlink_to(root)
    (root / "away").symlink_to(tmp_path / "elsewhere")
    assert found(root) == []


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(NotFoundError, match="no such file"):
        list(discover(tmp_path / "missing"))
