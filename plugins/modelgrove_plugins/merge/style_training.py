"""The training of one style by `museum`, whose docstring has the formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelgrove_hub.contracts import Picture
from modelgrove_hub.errors import UsageError
from modelgrove_hub.formats.style_tokens import place_rows, split_prompt

if TYPE_CHECKING:
    from diffusers import DDPMScheduler
    from torch import Generator, Tensor, nn

    from modelgrove_plugins.evaluate.live import Live
    from modelgrove_plugins.merge.museum import MuseumParams
    from modelgrove_plugins.preview.painter import Painter

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Layers of a first version, by the ends of their names."""
RANK = 8
"""Of a first version, if none is wanted."""
_MEASURED = 16
_DEVIATION = 1e-5

Shared = dict[str, tuple["Tensor", "Tensor"]]
"""By module, down (r, in) and up (out, r), float32: ΔW = up · down."""


@dataclass(frozen=True)
class Version:
    """What the training starts from: a shared LoRA, its tokens (1, width) in order, and where it comes from."""

    shared: Shared
    tokens: dict[str, Tensor]
    parent: str | None
    base: str


@dataclass(frozen=True)
class Measured:
    """On fixed draws: the style distillation loss, how far answers on earlier styles moved, mean cosine of the ΔW."""

    style: float
    moved: Mapping[str, float]
    cosine: float | None


@dataclass(frozen=True)
class Studio:
    """A base in memory; only what is attached to its denoiser will change."""

    painter: Painter
    live: Live
    name: str


class Training:
    """One style's training: `step` changes `shared` and `token`, nothing else.

    Raises:
        UsageError: the denoiser has no attention, or reads no states of the caption.
    """

    def __init__(
        self, studio: Studio, version: Version, pictures: Sequence[Picture], params: MuseumParams, generator: Generator
    ) -> None:
        import torch

        self.live, self.params, self.version, self.generator = studio.live, params, version, generator
        self.network, self.schedule = studio.live.network, studio.live.schedule
        self.latents = studio.painter.encode([picture.image for picture in pictures]).clone()
        # A caption may write the token itself: it is learned in the place that prompts give it.
        own = {params.token: torch.empty(1, 0)}
        self.captions = [split_prompt(picture.caption, own)[0] for picture in pictures]
        states = _states(*studio.live.conditions(self.captions[:1]), studio.name)
        start = version.shared or _fresh(self.network, params.rank or RANK, generator, studio.name)
        deviation = float(states.std())
        token = deviation * torch.randn(1, states.shape[-1], generator=generator)
        self.token = token.requires_grad_()
        self.shared: Shared = {
            name: (down.clone().requires_grad_(), up.clone().requires_grad_()) for name, (down, up) in start.items()
        }
        factors = [factor for pair in self.shared.values() for factor in pair]
        self.optimizer = torch.optim.Adam(
            [{"params": factors, "first": params.learning_rate}, {"params": [self.token], "first": params.token_rate}]
        )

    def step(self, share: float) -> None:
        """One step of Adam at this share of the learning rates."""
        import torch

        for group in self.optimizer.param_groups:
            group["lr"] = share * group["first"]
        self.optimizer.zero_grad()
        torch.autograd.backward(self.loss(self._draw(self.params.batch, self.generator)))
        self.optimizer.step()

    def loss(self, draw: Draw) -> Tensor:
        """The sum of the three terms."""
        total = self.style(draw)
        if self.version.tokens:
            if self.params.features:
                total = total + self.params.features * self.moved(draw, self._earlier())
            if self.params.direction:
                total = total + self.params.direction * (1 - self.cosine())
        return total

    def style(self, draw: Draw) -> Tensor:
        """The style distillation loss.

        Raises:
            UsageError: the training has diverged.
        """
        loss = (self._answer(draw, self.shared, self.token) - draw.right).square().mean()
        if not bool(loss.isfinite()):
            raise UsageError(
                f"the training of <{self.params.token}> has diverged, its loss is {float(loss.detach())}: "
                "lower --learning-rate or --token-rate"
            )
        return loss

    def moved(self, draw: Draw, name: str) -> Tensor:
        """The feature term of one earlier style."""
        import torch

        token = self.version.tokens[name]
        with torch.no_grad():
            was = self._answer(draw, self.version.shared, token)
        return (self._answer(draw, self.shared, token) - was).square().mean()

    def cosine(self) -> Tensor:
        """The mean over the layers of cos(ΔW, ΔW_prev); a ΔW_prev of zero has no direction and is left out."""
        import torch

        found = []
        for name, (down, up) in self.shared.items():
            old_down, old_up = self.version.shared[name]
            norm = _inner((old_down, old_up), (old_down, old_up)) * _inner((down, up), (down, up))
            if float(norm.detach()) > 0:
                found.append(_inner((down, up), (old_down, old_up)) / norm.sqrt())
        return torch.stack(found).mean() if found else torch.ones(())

    def measured(self) -> Measured:
        """All terms on the same draws each time."""
        import torch

        with torch.no_grad():
            draw = self._draw(_MEASURED, torch.Generator().manual_seed(0))
            moved = {name: float(self.moved(draw, name)) for name in self.version.tokens}
            return Measured(float(self.style(draw)), moved, float(self.cosine()) if self.version.shared else None)

    def _earlier(self) -> str:
        import torch

        names = list(self.version.tokens)
        return names[int(torch.randint(len(names), (1,), generator=self.generator))]

    def _draw(self, size: int, generator: Generator) -> Draw:
        """Noised pictures of which the base, without the LoRA, has redrawn the content."""
        import torch

        from modelgrove_plugins.evaluate.live import right_answer

        rows = torch.randint(len(self.latents), (size,), generator=generator)
        times = torch.randint(self.schedule.config.num_train_timesteps, (size,), generator=generator)
        latents = self.latents[rows]
        noise = torch.randn(latents.shape, generator=generator)
        positional, named = self.live.conditions([self.captions[row] for row in rows.tolist()])
        draw = Draw(self.schedule.add_noise(latents, noise, times), times, positional, named, latents)
        if self.params.suppress:
            with torch.no_grad():
                answer = self._answer(draw, {}, None)
            seen = _cleaned(self.schedule, draw.noised, answer, times)
            latents = torch.lerp(latents, restyled(seen, latents), self.params.suppress)
        right = right_answer(self.schedule, latents, noise, times)
        return Draw(self.schedule.add_noise(latents, noise, times), times, positional, named, right)

    def _answer(self, draw: Draw, shared: Shared, token: Tensor | None) -> Tensor:
        from modelgrove_kernels.calls import output_of

        positional, named = draw.positional, draw.named
        if token is not None:
            positional, named = _with_states(positional, named, lambda states: _spoken(states, token))
        with _attached(self.network, shared):
            return output_of(self.network(draw.noised, draw.times, *positional[2:], **named))


@dataclass(frozen=True)
class Draw:
    """Noised latents (b, c, h, w), their times (b,), the denoiser's other arguments and what it should answer."""

    noised: Tensor
    times: Tensor
    positional: tuple[Any, ...]
    named: Mapping[str, Any]
    right: Tensor


def restyled(content: Tensor, style: Tensor) -> Tensor:
    """The content with the mean and deviation over the places that the style has in each channel, (b, c, h, w)."""
    moments = [(z.mean((2, 3), keepdim=True), z.std((2, 3), keepdim=True)) for z in (content, style)]
    (mean, deviation), (wanted_mean, wanted_deviation) = moments
    return wanted_deviation * (content - mean) / (deviation + _DEVIATION) + wanted_mean


def _inner(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """The inner product of up · down and up' · down', from r × r matrices."""
    (down, up), (other_down, other_up) = one, other
    return ((up.T @ other_up) * (down @ other_down.T)).sum()


def _fresh(network: nn.Module, rank: int, generator: Generator, name: str) -> Shared:
    """A LoRA on all attention projections that changes nothing yet: down Kaiming-uniform as in PEFT, up zero."""
    import torch
    from torch import nn

    found: Shared = {}
    for path, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and path.endswith(TARGETS):
            down = torch.empty(rank, layer.in_features)
            nn.init.kaiming_uniform_(down, a=5**0.5, generator=generator)
            found[path] = (down, torch.zeros(layer.out_features, rank))
    if not found:
        raise UsageError(f"{name} has no attention projections ({', '.join(TARGETS)}) that a LoRA could change")
    return found


@contextmanager
def _attached(network: nn.Module, shared: Shared) -> Iterator[None]:
    """The LoRA acts while the context lasts: its layers answer W·x + up · (down · x)."""

    def hook(down: Tensor, up: Tensor) -> Callable[..., Tensor]:
        return lambda _layer, inputs, output: output + (inputs[0] @ down.T) @ up.T

    layers = dict(network.named_modules())
    handles = [layers[name].register_forward_hook(hook(*pair)) for name, pair in shared.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _states(positional: tuple[Any, ...], named: Mapping[str, Any], name: str) -> Tensor:
    """What cross-attention reads, (n, tokens, width), among the denoiser's arguments."""
    found: Any = named.get("encoder_hidden_states", positional[2] if len(positional) > 2 else None)
    if getattr(found, "ndim", 0) != 3:
        raise UsageError(f"the denoiser of {name} reads no states of a caption, so no token can be learned")
    states: Tensor = found
    return states


def _with_states(
    positional: tuple[Any, ...], named: Mapping[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    key = "encoder_hidden_states"
    if key in named:
        return positional, {**named, key: change(named[key])}
    return (*positional[:2], change(positional[2]), *positional[3:]), named


def _spoken(states: Tensor, token: Tensor) -> Tensor:
    return place_rows(states, [[token]] * len(states))


def _cleaned(schedule: DDPMScheduler, noised: Tensor, answer: Tensor, times: Tensor) -> Tensor:
    """The latents without noise, as an answer makes them out."""
    kept: Tensor = schedule.alphas_cumprod[times].view(-1, 1, 1, 1)
    signal, noise = kept.sqrt(), (1 - kept).sqrt()
    if schedule.config.prediction_type == "v_prediction":
        return signal * noised - noise * answer
    return (noised - noise * answer) / signal if schedule.config.prediction_type == "epsilon" else answer
