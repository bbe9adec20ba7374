import json
import shutil

import pytest
from zoo_models import BASE, DATA

from modelgrove_analyzers.encoders.denoiser import open_denoiser
from modelgrove_hub.errors import CorruptFileError, UsageError
from modelgrove_hub.testing import FolderModel


def copied(tmp_path):
    shutil.copytree(DATA / "zoo-base", tmp_path / "base")
    return tmp_path / "base"


def test_the_zoos_base_is_opened_as_it_was_made():
    denoiser = open_denoiser(BASE)
    assert denoiser.latent_shape == (24, 8, 8)
    assert denoiser.alphas_cumprod.shape == (1000,)
    assert denoiser.states(["a cat", "two dogs"]).shape == (2, 16, 384)
    assert not any(parameter.requires_grad for parameter in denoiser.unet.parameters())


def test_a_pipeline_that_cannot_be_asked_is_named(tmp_path):
    folder = copied(tmp_path)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StrangePipeline"}))
    with pytest.raises(UsageError, match="StrangePipeline"):
        open_denoiser(FolderModel(folder))


def test_another_text_encoder_is_named(tmp_path):
    folder = copied(tmp_path)
    index = json.loads((folder / "model_index.json").read_text()) | {"text_encoder_name": "someone/else"}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="someone/else"):
        open_denoiser(FolderModel(folder))


@pytest.mark.parametrize("content", ["[]", "{", "[" * 10_000])
def test_a_broken_configuration_is_refused(tmp_path, content):
    folder = copied(tmp_path)
    (folder / "unet/config.json").write_text(content)
    with pytest.raises(UsageError, match=r"unet/config\.json"):
        open_denoiser(FolderModel(folder))


def test_weights_of_another_network_are_refused(tmp_path):
    folder = copied(tmp_path)
    config = json.loads((folder / "unet/config.json").read_text()) | {"block_out_channels": [32, 64]}
    (folder / "unet/config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptFileError, match="unet"):
        open_denoiser(FolderModel(folder))
