"""Build a diffusers UNet from a stranger's configuration and tensors: bounded, compared, never trusted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modelgrove_hub.errors import CorruptFileError, DataError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch import Tensor

_MAX_BLOCKS = 8
_MAX_LAYERS = 16


def build_unet(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> UNet2DConditionModel:
    """The UNet in float32, for inference. It is built without memory, then given the tensors as they are named.

    Raises:
        DataError: the configuration asks for more than eight blocks of sixteen layers, or for what diffusers refuses.
        CorruptFileError: the tensors are not those of such a network.
    """
    import torch
    from diffusers import UNet2DConditionModel

    blocks, layers = config.get("down_block_types", ()), config.get("layers_per_block", 1)
    counts = layers if isinstance(layers, list | tuple) else [layers]
    if len(blocks) > _MAX_BLOCKS or not all(isinstance(n, int) and 0 < n <= _MAX_LAYERS for n in counts):
        raise DataError(f"unet/config.json: {len(blocks)} blocks of {layers} layers are more than is ever built here")
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(dict(config))
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise DataError(f"unet/config.json: {error}") from error
    wanted = {name: tensor.shape for name, tensor in unet.state_dict().items()}
    wrong = [name for name, shape in wanted.items() if name not in tensors or tensors[name].shape != shape]
    if wrong or len(tensors) != len(wanted):
        raise CorruptFileError(
            f"unet: {len(tensors)} tensors for a network of {len(wanted)}; "
            f"missing or of another shape: {', '.join(wrong[:3]) or 'none'}"
        )
    unet.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return unet.eval().requires_grad_(False)
