"""The part of a denoiser that sees nothing but the timestep (Huang et al., TFMQ-DM, arXiv 2311.16503).

emb_{t,i} = g_i(h(t)): a sinusoid of t, an MLP h, and in each block a linear layer g_i behind an activation. Where
captions, classes or sizes are added to h(t), emb_{t,i} = g_i(h(t) + a) with what was added in some calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from modelgrove_kernels.calls import told

_SINUSOID, _EMBEDDING = "Timesteps", "TimestepEmbedding"
"""Classes of diffusers, under which every denoiser of it embeds time."""
_SAME = 1e-4
"""Of what is added, relative to the largest sum: float32 sums of equal numbers differ by less."""


@dataclass
class Projection:
    """A linear layer that is given act(h(t) + added)."""

    path: str
    act: nn.Module
    added: Tensor
    """Float32 (n, E): what was added in n samples; (1, E) zeros where there is nothing."""


class TemporalBlock(nn.Module):
    """t → emb_{t,i} for all i: the Temporal Information Block of the paper; its layers are the network's own."""

    def __init__(
        self, sinusoid: nn.Module, embedding: nn.Module, path: str, projections: Sequence[Projection],
        network: nn.Module,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sinusoid, self.embedding = sinusoid, embedding
        self.layers = nn.ModuleList(network.get_submodule(one.path) for one in projections)
        self.acts = nn.ModuleList(one.act for one in projections)
        self._added = [one.added for one in projections]
        self.paths = {f"embedding.{name}": f"{path}.{name}" for name, _ in linear_layers(embedding)} | {
            f"layers.{place}": one.path for place, one in enumerate(projections)
        }
        """Path of a linear layer in this block → in the network."""

    @property
    def samples(self) -> int:
        """How many different things were added to h(t)."""
        return max(map(len, self._added), default=1)

    def forward(self, samples: Tensor, timestep: Tensor) -> Tensor:
        """Called as denoisers are: for each of n timesteps the sample whose addition counts, int64 (n,), and the
        timesteps (n,) → (n, Σ widths of emb_{t,i}), or h(t) where nothing projects it.
        """  # fmt: skip
        embedded: Tensor = self.embedding(self.sinusoid(timestep))
        if not self._added:
            return embedded
        inner = zip(self.layers, self.acts, self._added, strict=True)
        return torch.cat([layer(act(embedded + added[samples % len(added)])) for layer, act, added in inner], -1)

    @torch.no_grad()
    def inputs(self, samples: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        """What each linear layer is given, (n, K), by its path in this block."""
        found: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for path in self.paths:

                def keep(_layer: nn.Module, inputs: tuple[Tensor, ...], path: str = path) -> None:
                    found[path] = inputs[0]

                hooks.callback(self.get_submodule(path).register_forward_pre_hook(keep).remove)
            self(samples, timestep)
        return found


def linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Path and layer of all linear layers in `module`."""
    return ((path, layer) for path, layer in module.named_modules() if isinstance(layer, nn.Linear))


@contextmanager
def watched_time(network: nn.Module) -> Iterator[TimeWatch]:
    """What a denoiser does with its timesteps while the context lasts: it needs calls at two of them or more."""
    watch = TimeWatch(network)
    with ExitStack() as hooks:
        hooks.enter_context(told(network, watch.begin))
        for path, module in network.named_modules():
            kind = type(module).__name__
            hook: Any = None
            if kind == _SINUSOID:
                hook = watch.sinusoid(path)
            elif kind == _EMBEDDING:
                hook = watch.embedding(path)
            elif isinstance(module, nn.Linear):
                hook = watch.linear(path)
            elif not any(True for _ in module.parameters()) and not any(True for _ in module.children()):
                hook = watch.act
            if hook is not None:
                hooks.callback(module.register_forward_hook(hook).remove)
        yield watch


@dataclass
class _Seen:
    """One call."""

    time: float
    sinusoids: dict[str, Tensor] = field(default_factory=dict)
    embedded: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    """Embedding → its sinusoid."""
    inner: dict[str, tuple[nn.Module, Tensor]] = field(default_factory=dict)
    """Linear layer → the activation before it, and what that was given."""


class TimeWatch:
    """Hooks that tell what is embedded where; `blocks` says what came of it."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._calls: list[_Seen] = []
        self._acts: Any = WeakTensorKeyDictionary()  # it has no types

    def begin(self, time: float) -> None:
        """A call begins."""
        self._calls.append(_Seen(time))

    def sinusoid(self, path: str) -> Any:
        """The hook of a module without weights that is given t."""

        def hook(_module: nn.Module, inputs: tuple[Any, ...], answer: Tensor) -> None:
            call = self._calls[-1]
            if bool((inputs[0] == call.time).all()):  # not scaled on the way: clocks hear what the network was told
                call.sinusoids[path] = answer.detach()

        return hook

    def embedding(self, path: str) -> Any:
        """The hook of an MLP that may be given a sinusoid."""

        def hook(_module: nn.Module, inputs: tuple[Any, ...], answer: Tensor) -> None:
            call = self._calls[-1]
            call.embedded[path] = answer.detach()
            for source, value in call.sinusoids.items():
                if value.shape == inputs[0].shape and torch.equal(value.to(inputs[0].dtype), inputs[0]):
                    call.sources[path] = source

        return hook

    def act(self, module: nn.Module, inputs: tuple[Any, ...], answer: Any) -> None:
        """The hook of a module that may be an activation function."""
        if isinstance(answer, Tensor) and answer.ndim == 2 and inputs and isinstance(inputs[0], Tensor):
            self._acts[answer] = module, inputs[0].detach()

    def linear(self, path: str) -> Any:
        """The hook of a layer that may be given an embedding."""

        def hook(_module: nn.Module, inputs: tuple[Any, ...], _answer: Tensor) -> None:
            if inputs[0].ndim == 2:
                self._calls[-1].inner[path] = self._acts.get(inputs[0], (nn.Identity(), inputs[0].detach()))

        return hook

    def blocks(self) -> list[TemporalBlock]:
        """The temporal blocks: one for each embedding of t; none where two different timesteps were not seen."""
        first = next(iter(self._calls), None)
        other = next((call for call in self._calls if first and call.time != first.time), None)
        if first is None or other is None:
            return []
        return [self._block(path, source, first, other) for path, source in first.sources.items()]

    def _block(self, path: str, source: str, first: _Seen, other: _Seen) -> TemporalBlock:
        projections = [
            Projection(layer, act, added)
            for layer, (act, _) in first.inner.items()
            if not layer.startswith(f"{path}.") and (added := _added(layer, path, first, other)) is not None
        ]
        modules = self._network.get_submodule(source), self._network.get_submodule(path)
        return TemporalBlock(*modules, path, projections, self._network)


def _added(layer: str, embedding: str, first: _Seen, other: _Seen) -> Tensor | None:
    """What is added to an embedding before a layer, (n, E), if that does not depend on the timestep; else None."""
    found = []
    for call in (first, other):
        inner = call.inner[layer][1] if layer in call.inner else torch.zeros(0)
        if inner.shape != call.embedded[embedding].shape:
            return None
        found.append((inner - call.embedded[embedding]).float())
    limit = _SAME * float(first.inner[layer][1].abs().max())
    if found[0].shape != found[1].shape or float((found[0] - found[1]).abs().max()) > limit:
        return None
    return torch.unique(found[0], dim=0) if float(found[0].abs().max()) > limit else torch.zeros(1, found[0].shape[1])
