"""The real pictures, and a base so small that training on it takes milliseconds."""

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

import modelgrove_analyzers.zoo
from modelgrove_analyzers.zoo.base import SCHEDULER, UNET, to_pixels
from modelgrove_analyzers.zoo.base_folder import ZooBase
from modelgrove_analyzers.zoo.pictures import PictureSet
from modelgrove_kernels.codec import LinearCodec

DATA = Path(modelgrove_analyzers.zoo.__file__).parent / "data"


@pytest.fixture(scope="session")
def pictures() -> PictureSet:
    return PictureSet.load(DATA)


@pytest.fixture(scope="session")
def codec(pictures: PictureSet) -> LinearCodec:
    return LinearCodec.fit(to_pixels(pictures.pixels[:300]), 4)


@pytest.fixture(scope="session")
def tiny(codec: LinearCodec) -> ZooBase:
    """The zoo's architecture with 16 and 32 channels: its attention layers bear the same names."""
    torch.manual_seed(0)
    small = {"block_out_channels": (16, 32), "norm_num_groups": 8, "attention_head_dim": 2}
    unet = UNet2DConditionModel(in_channels=4, out_channels=4, **{**UNET, **small})
    return ZooBase(unet.eval(), DDPMScheduler(**SCHEDULER), codec)
