"""The same linear layer in other packages, for `kernels.py`: name → the package's module and what makes the layer.

Each takes the float32 weight (outputs, inputs) and bias, and gives what makes copies of a module that computes in
float32.
"""

from __future__ import annotations

from collections.abc import Callable
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


def torchao(kind: str) -> Make:
    def make(weight: Tensor, bias: Tensor) -> Copies:
        from torchao import quantization
        from torchao.quantization.granularity import PerGroup

        configs = {
            "int8": quantization.Int8WeightOnlyConfig,
            "int8 dynamic": quantization.Int8DynamicActivationInt8WeightConfig,
            "int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP)),
        }
        model = plain(weight, bias)
        quantization.quantize_(model, configs[kind]())
        return partial(deepcopy, model)

    return make


def quanto(kind: str) -> Make:
    def make(weight: Tensor, bias: Tensor) -> Copies:
        from optimum import quanto

        def copy() -> nn.Module:
            model = plain(weight, bias)
            quanto.quantize(model, weights=kind)
            quanto.freeze(model)
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
