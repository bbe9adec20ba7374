"""What other packages quantize: the same linear layer for `kernels.py`, and whole networks for `compress.py`.

`PEERS`: name → the package's module and what makes the layer. Each takes the float32 weight (outputs, inputs) and bias,
and gives what makes copies of a module that computes in float32.

`NETWORKS`: name → the package's module and what quantizes a float32 network in place. Each takes the names of the
layers that are to be quantized, and leaves those that the package has no form for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

GROUP = 64

Copies = Callable[[], nn.Module]
Make = Callable[[Tensor, Tensor], Copies]


def plain(weight: Tensor, bias: Tensor) -> nn.Module:
    """A model of one layer: some packages replace layers in their parent."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return nn.Sequential(layer).requires_grad_(False)


def quantize_torchao(kind: str, network: nn.Module, layers: Collection[str]) -> None:
    """Linear layers alone; at 4 bits those whose inputs can be cut into groups of 64, or of 32 where 64 do not fit."""
    from torchao import quantization
    from torchao.quantization.granularity import PerGroup

    def quantize(config: object, takes: Callable[[int], bool]) -> None:
        quantization.quantize_(
            network,
            config,
            lambda layer, name: isinstance(layer, nn.Linear) and name in layers and takes(layer.in_features),
        )

    if kind == "int8":
        quantize(quantization.Int8WeightOnlyConfig(), lambda _: True)
    elif kind == "int8 dynamic":
        quantize(quantization.Int8DynamicActivationInt8WeightConfig(), lambda _: True)
    else:
        for group, takes in (
            (GROUP, lambda width: width % GROUP == 0),
            (GROUP // 2, lambda width: width % GROUP == 32),
        ):
            config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group))
            quantize(config, takes)


def quantize_quanto(kind: str, network: nn.Module, layers: Collection[str]) -> None:
    """Linear layers and convolutions; it finds the width of groups itself."""
    from optimum import quanto

    quanto.quantize(network, weights=kind, include=list(layers))
    quanto.freeze(network)


def torchao(kind: str) -> Make:
    def make(weight: Tensor, bias: Tensor) -> Copies:
        model = plain(weight, bias)
        quantize_torchao(kind, model, ["0"])
        return partial(deepcopy, model)

    return make


def quanto(kind: str) -> Make:
    def make(weight: Tensor, bias: Tensor) -> Copies:
        def copy() -> nn.Module:
            model = plain(weight, bias)
            quantize_quanto(kind, model, ["0"])
            return model

        return copy

    return make


def bitsandbytes(kind: str) -> Make:
    def make(weight: Tensor, bias: Tensor) -> Copies:
        from bitsandbytes.nn import Linear4bit, Linear8bitLt

        outputs, inputs = weight.shape
        layer = (
            Linear8bitLt(inputs, outputs, has_fp16_weights=False)
            if kind == "int8"
            else Linear4bit(inputs, outputs, compute_dtype=torch.float32, quant_type=kind)
        )
        layer.load_state_dict({"weight": weight, "bias": bias})
        return partial(deepcopy, layer.to("cpu"))

    return make


def gguf(kind: str) -> Make:
    def make(weight: Tensor, bias: Tensor) -> Copies:
        import gguf
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

        code = gguf.GGMLQuantizationType[kind]
        stored = torch.from_numpy(gguf.quants.quantize(weight.numpy(), code))

        def copy() -> nn.Module:
            layer = GGUFLinear(weight.shape[1], weight.shape[0], bias=True, compute_dtype=torch.float32)
            layer.weight, layer.bias = GGUFParameter(stored.clone(), quant_type=code), nn.Parameter(bias)
            return layer.requires_grad_(False)

        return copy

    return make


PEERS: dict[str, tuple[str, Make]] = {
    **{f"torchao {kind}": ("torchao", torchao(kind)) for kind in ("int8", "int8 dynamic", "int4")},
    **{f"quanto {kind}": ("optimum", quanto(kind)) for kind in ("qint8", "qint4")},
    **{f"bitsandbytes {kind}": ("bitsandbytes", bitsandbytes(kind)) for kind in ("int8", "nf4")},
    **{f"gguf {kind}": ("gguf", gguf(kind)) for kind in ("Q8_0", "Q4_0")},
}
NETWORKS: dict[str, tuple[str, Callable[[nn.Module, Collection[str]], None]]] = {
    **{f"torchao {kind}": ("torchao", partial(quantize_torchao, kind)) for kind in ("int8", "int8 dynamic", "int4")},
    **{f"quanto {kind}": ("optimum", partial(quantize_quanto, kind)) for kind in ("qint8", "qint4")},
}
