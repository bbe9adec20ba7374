"""Diffusion networks that packages carry, as models that compressors take, for `compress.py`: name → `NETWORKS`.

    terrain   adaptive-terrain-diffusion (MIT): a distilled consistency UNet, 10.5 million parameters, ONNX. It was
              distilled at σ = 80 alone, where it paints in one step.
    hsc64, quasar72
              galaxygrad 0.1.9: score networks of galaxies, MLP-Mixers of 1.6 and 2 million parameters. The package
              declares no licence, so it is measured where it is installed (`pip install --no-deps galaxygrad==0.1.9`),
              and nothing depends on it.

Their weights become a folder in which the network is called `unet`, and prompts and seeds its noise, so that
compressors calibrate, and are compared, by the code that does so for pipelines. What needs the classes of diffusers
(blocks that are removed or known by name) finds nothing there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch
from zlib import crc32

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from modelgrove_hub.testing import FolderModel
from modelgrove_plugins.preview.painter import Wish, batches

if TYPE_CHECKING:
    from modelgrove_plugins.preview.diffusers import PreviewParams

BATCH = 8


@dataclass(frozen=True)
class Network:
    """How a package's network is read and sampled: `sample` gives pictures (n, 1, h, w) in [0, 1]."""

    package: str
    load: Callable[[Path], nn.Module]
    sample: Callable[[nn.Module, Sequence[torch.Generator], int], Tensor]


class Graph(nn.Module):
    """An ONNX graph: its convolutions and linear layers are torch's, at the paths of their weights' names."""

    def __init__(self, path: Path) -> None:
        import onnx

        super().__init__()
        graph = onnx.load(path).graph
        held = {one.name: torch.from_numpy(onnx.numpy_helper.to_array(one).copy()) for one in graph.initializer}
        self._inputs = [one.name for one in graph.input]
        self._output = graph.output[0].name
        self._nodes: list[tuple[str, list[str], list[str], dict[str, Any]]] = []
        for node in graph.node:
            given = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
            inputs, outputs = [name for name in node.input if name], list(node.output)
            if node.op_type in ("Conv", "Gemm"):
                layer = inputs[1].removesuffix(".weight")
                self._place(layer, _layer(held.pop(inputs[1]), held.pop(inputs[2]), given))
                self._nodes.append(("layer", inputs[:1], outputs, {"path": layer}))
            else:
                self._nodes.append((node.op_type, inputs, outputs, given))
        self._constants = held
        last = {name: index for index, (_, inputs, *_) in enumerate(self._nodes) for name in inputs}
        self._done = [[name for name, at in last.items() if at == index] for index in range(len(self._nodes))]

    def _place(self, path: str, layer: nn.Module) -> None:
        *parents, leaf = path.split(".")
        home: nn.Module = self
        for name in parents:
            if not hasattr(home, name):
                home.add_module(name, nn.Module())
            home = home.get_submodule(name)
        home.add_module(leaf, layer)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The graph's first output."""
        values = {**self._constants, **dict(zip(self._inputs, inputs, strict=True))}
        for (kind, names, outputs, given), done in zip(self._nodes, self._done, strict=True):
            function = self.get_submodule(given["path"]) if kind == "layer" else partial(OPERATORS[kind], **given)
            found = function(*(values[name] for name in names))
            values.update(zip(outputs, found if isinstance(found, tuple) else (found,), strict=True))
            for name in done:
                del values[name]
        return values[self._output]


def _layer(weight: Tensor, bias: Tensor, given: Mapping[str, Any]) -> nn.Module:
    if weight.ndim == 2:  # Gemm with transB
        layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0])
    else:
        layer = nn.Conv2d(
            weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), given["strides"], given["pads"][:2]
        )
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def _reshape(x: Tensor, shape: Tensor, allowzero: int) -> Tensor:
    return x.reshape([x.shape[at] if not size and not allowzero else size for at, size in enumerate(shape.tolist())])


def _unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    for axis in sorted(axes.tolist()):
        x = x.unsqueeze(axis)
    return x


OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": torch.div,
    "Pow": torch.pow,
    "Sqrt": torch.sqrt,
    "Log": torch.log,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Sigmoid": torch.sigmoid,
    "Reciprocal": torch.reciprocal,
    "Clip": torch.clamp,
    "Squeeze": torch.squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Shape": lambda x, start=0, end=None: torch.tensor(x.shape[start:end]),
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "Split": lambda x, axis, num_outputs: x.chunk(num_outputs, axis),
    "Softmax": lambda x, axis: x.softmax(axis),
    "Einsum": lambda *parts, equation: torch.einsum(equation.decode(), *parts),
    "InstanceNormalization": lambda x, gain, bias, epsilon: functional.instance_norm(
        x, weight=gain, bias=bias, eps=epsilon
    ),
    "AveragePool": lambda x, kernel_shape, **_: functional.avg_pool2d(x, kernel_shape),
    "Resize": lambda x, scales, **_: functional.interpolate(x, scale_factor=scales.tolist()[2:], mode="nearest"),
}
"""Those of the graphs that are read here, as PyTorch's exporter writes them."""


class MixerBlock(nn.Module):
    """Mixes patches, then channels: (n, channels, patches) → the same."""

    def __init__(self, patches: int, channels: int) -> None:
        super().__init__()
        self.patch_mixer, self.hidden_mixer = _mlp(patches), _mlp(channels)
        self.norm1, self.norm2 = nn.LayerNorm((channels, patches)), nn.LayerNorm((patches, channels))

    def forward(self, y: Tensor) -> Tensor:
        """One block."""
        y = (y + self.patch_mixer(self.norm1(y))).mT
        return (y + self.hidden_mixer(self.norm2(y))).mT


class ScoreNet(nn.Module):
    """galaxygrad's network, with the noise ε = -σ · score as its answer: so all times count alike."""

    def __init__(self, side: int, patch: int = 4, channels: int = 64, blocks: int = 4) -> None:
        super().__init__()
        self.side, patches = side, (side // patch) ** 2
        self.conv_in = nn.Conv2d(2, channels, patch, patch)
        self.conv_out = nn.ConvTranspose2d(channels, 1, patch, patch)
        self.blocks = nn.ModuleList(MixerBlock(patches, channels) for _ in range(blocks))
        self.norm = nn.LayerNorm((channels, patches))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(n, 1, side, side) at `time`, one number in [0, 10] → ε."""
        y = self.conv_in(torch.cat([x, (time / 10).expand_as(x)], 1))
        shape = y.shape
        y = y.flatten(2)
        for block in self.blocks:
            y = block(y)
        return -_sigma(time) * self.conv_out(self.norm(y).view(shape))


def _mlp(width: int, hidden: int = 512) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))


def _sigma(time: Tensor) -> Tensor:
    return (1 - torch.exp(-time)).sqrt()


def load_galaxies(folder: Path, name: str, side: int) -> ScoreNet:
    """Equinox writes a network's arrays one after the other, in the order of its fields, which is ours."""
    network = ScoreNet(side)
    state = network.state_dict()
    with (folder / f"{name}.eqx").open("rb") as file:
        found = {key: torch.from_numpy(np.load(file, allow_pickle=False)) for key in state}
    # Its transposed convolution multiplies with the kernel turned round, outputs first.
    found["conv_out.weight"] = found["conv_out.weight"].flip(2, 3).transpose(0, 1)
    network.load_state_dict({key: tensor.reshape(state[key].shape) for key, tensor in found.items()})
    return network


def sample_galaxies(network: nn.Module, random: Sequence[torch.Generator], steps: int) -> Tensor:
    """DDIM from t = 10 to .01; ten is white."""
    side = network.side
    x = torch.stack([torch.randn(1, side, side, generator=one) for one in random])
    for now, later in pairwise(torch.logspace(1, -2, steps + 1)):
        noise = network(x, now)
        x = torch.exp((now - later) / 2) * (x - _sigma(now) * noise) + _sigma(later) * noise
    return x / 10


def load_terrain(folder: Path) -> Graph:
    """The only graph in the package."""
    (path,) = (folder / "weights").glob("*.onnx")
    return Graph(path)


def sample_terrain(network: nn.Module, random: Sequence[torch.Generator], steps: int, side: int = 128) -> Tensor:  # noqa: ARG001
    """One step; each picture has a difficulty of its own."""
    difficulty = torch.cat([torch.rand(1, generator=one) for one in random])
    noise = torch.stack([torch.randn(1, side, side, generator=one) for one in random])
    x: Tensor = network(80 * noise, torch.full((len(random),), 80.0), difficulty)
    return (x + 1) / 2


NETWORKS = {
    "terrain": Network("terrain_diffusion", load_terrain, sample_terrain),
    "hsc64": Network("galaxygrad", lambda folder: load_galaxies(folder, "eqx_hsc_ScoreNet64", 64), sample_galaxies),
    "quasar72": Network("galaxygrad", lambda folder: load_galaxies(folder, "eqx_quasar_lens72", 72), sample_galaxies),
}


@dataclass
class NetworkPainter:
    """A network in the place of a pipeline."""

    unet: nn.Module
    sample: Callable[[nn.Module, Sequence[torch.Generator], int], Tensor]
    pipeline: str
    scheduler: str = ""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """Component name → network."""
        return {"unet": self.unet}

    def swap(self, component: str, network: nn.Module) -> None:
        """Paint with another network; the denoiser is the only one."""
        setattr(self, component, network)

    @torch.inference_mode()
    def paint(
        self, wishes: Sequence[Wish], params: PreviewParams, progress: Callable[[float], None]
    ) -> list[Image.Image]:
        """One picture for each (prompt, seed)."""
        pictures: list[Image.Image] = []
        for batch, report in batches(wishes, BATCH, progress):
            random = [torch.Generator().manual_seed(crc32(prompt.encode()) + seed) for prompt, seed in batch]
            grey = self.sample(self.unet, random, params.steps).clamp(0, 1).mul(255).round().byte()
            pictures += [Image.fromarray(one.numpy()).convert("RGB") for one in grey[:, 0]]
            report(1)
        return pictures


def available() -> list[str]:
    """The names of the networks whose packages are installed."""
    return [name for name, network in NETWORKS.items() if find_spec(network.package)]


@contextmanager
def opened(name: str, folder: Path) -> Iterator[FolderModel]:
    """The network called `name` as a model in `folder`; previews paint with it while the context lasts."""
    network = NETWORKS[name]
    [source] = map(Path, find_spec(network.package).submodule_search_locations)
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    (folder / "unet/config.json").write_text("{}")
    save_file(network.load(source).state_dict(), folder / "unet/model.safetensors")

    def open_painter(_model: object, _folder: Path) -> NetworkPainter:
        return NetworkPainter(network.load(source).requires_grad_(False), network.sample, name)

    # Pipelines are known by their class; there is none for these.
    with patch("modelgrove_plugins.preview.diffusers.open_painter", open_painter):
        yield FolderModel(folder, name=name)
