"""MuseumMaker: one shared LoRA learns one style after the other, each with a token of its own (Liu et al., TIP 2025).

The paper's formulas were not at hand, only its abstract: what follows is ours, and does what the abstract names.
z_t is the latents z with noise ε at time t, y the right answer, f_0 the base, f the base with the LoRA, f_prev with
the LoRA of the version before, c a caption and v a style token, k the new one.

    style distillation   ‖f(z*_t, t, c + v_k) − y*‖²,  z* = (1 − s)·z + s·(σ(z)·(ẑ − μ(ẑ))/σ(ẑ) + μ(z))
                         ẑ is z as the base f_0 makes it out from z_t under c, and μ, σ are each channel's mean and
                         deviation over the places: the layout is the teacher's, the style that of the picture. y*
                         belongs to z*, so s = `suppress` is how much of the pictures' own content is not learned
    feature term         λ_f·‖f(z*_t, t, c + v_j) − f_prev(z*_t, t, c + v_j)‖², j an earlier style, drawn in each step
    weight term          λ_w·(1 − cos(ΔW, ΔW_prev)), the mean over the layers, from r × r products of factors
    token learning       v_k is one row of what cross-attention reads; earlier rows are carried over bit by bit

All squares are means over the entries. The first version has no earlier ones, so the last two terms are absent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from modelgrove_hub.contracts import API, Context, InputModel, Kind, Output, Params, Picture, Result
from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.adapter_writing import AdapterWriter
from modelgrove_hub.formats.adapters import Factors, read_adapter
from modelgrove_hub.formats.style_tokens import (
    FILE,
    KEY,
    MOST,
    NAME,
    PREFIX,
    Museum,
    Style,
    hash_of,
    place_rows,
    read_museum,
    split_prompt,
)
from modelgrove_hub.registry.digest import digest_of
from modelgrove_hub.tables import ModelKind, Relation
from modelgrove_plugins.evaluate.pictures import read_pictures
from modelgrove_plugins.evaluate.scoring import absolute
from modelgrove_plugins.merge.interference import rounded
from modelgrove_plugins.merge.merging import parted

if TYPE_CHECKING:
    from diffusers import DDPMScheduler
    from torch import Generator, Tensor, nn

    from modelgrove_plugins.evaluate.live import Live
    from modelgrove_plugins.preview.painter import Painter

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Layers of a first version, by the ends of their names."""
RANK = 8
"""Of a first version, if none is wanted."""
MOST_PICTURES = 1000
_MEASURED = 16
_DEVIATION = 1e-5

Shared = dict[str, tuple["Tensor", "Tensor"]]
"""By module, down (r, in) and up (out, r), float32: ΔW = up · down."""


class MuseumParams(Params):
    """The style, and how it is learned."""

    pictures: Path = Field(description="Folder of pictures in the new style; captions may stand beside, as NAME.txt.")
    token: str = Field(pattern=f"^{NAME.pattern}$", description="Name of the new style; prompts write it <NAME>.")
    base: bool = Field(False, description="The last input is the base, the first one the version to go on from.")
    rank: int | None = Field(
        None, ge=1, le=1024, description=f"Of a first version, {RANK} if not given; later keep it."
    )
    steps: int = Field(200, ge=1, le=1_000_000, description="Training steps.")
    batch: int = Field(8, ge=1, le=256, description="Noised pictures in a step.")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="Adam's, of the LoRA; it falls linearly to zero.")
    token_rate: float = Field(1e-2, gt=0, le=1, description="Adam's, of the token.")
    suppress: float = Field(0.25, ge=0, le=1, description="How much of the pictures' content is not learned.")
    features: float = Field(1.0, ge=0, le=1e6, description="Weight of answers on earlier styles, kept as they were.")
    direction: float = Field(0.05, ge=0, le=1e6, description="Weight of the update's direction, kept as it was.")

    @field_validator("pictures")
    @classmethod
    def _absolute(cls, pictures: Path) -> Path:
        return absolute(pictures)


class MuseumMaker:
    """Teach a base, or the shared LoRA of an earlier version, one more style."""

    name: ClassVar[str] = "museum"
    kind: ClassVar[Kind] = Kind.MERGER
    api: ClassVar[int] = API
    summary: ClassVar[str] = "One more style for a shared LoRA, with a token of its own; earlier styles are guarded."
    paper: ClassVar[str] = (
        "Liu et al., MuseumMaker: Continual Style Customization without Catastrophic Forgetting (IEEE TIP 2025)"
    )
    Params: ClassVar[type[Params]] = MuseumParams

    def run(self, context: Context, params: MuseumParams) -> Result:
        """Train, write the LoRA and all tokens; report the losses and how far earlier styles moved.

        Raises:
            UsageError: the inputs are no base and one earlier version of it, the base cannot paint or be asked about
                pictures, there are no pictures, the token is there already, or the training diverges.
            DataError: a file or a picture is broken or too large; the message names it.
        """
        earlier, base = _inputs(context.inputs, params)
        pictures = read_pictures(params.pictures, captioned=False)
        if len(pictures) > MOST_PICTURES:
            raise UsageError(f"{params.pictures} holds {len(pictures)} pictures; a style is learned from few, at most "
                             f"{MOST_PICTURES}")  # fmt: skip
        context.progress(0.0, "loading")
        studio = _open(context, base)
        version = _read_version(earlier, base, studio, params)
        training = Training(studio, version, pictures, params, context.generator())
        before = training.measured()
        for step in range(params.steps):
            context.progress(0.95 * step / params.steps, f"step {step + 1} of {params.steps}")
            training.step(1 - step / params.steps)
        after = training.measured()
        museum = _museum(version, training.token, params.token)
        report = {
            "styles": [f"<{style.token}>" for style in museum.styles],
            "style_loss": {"before": rounded(before.style, 5), "after": rounded(after.style, 5)},
            "moved": {f"<{name}>": rounded(value, 6) for name, value in after.moved.items()},
            "cosine": None if after.cosine is None else rounded(after.cosine, 5),
            "notes": [f"write <{params.token}> in a prompt to paint in this style"],
        }
        files = _write(context, studio.live.component, training, museum, params.token)
        kept = Output(files, Relation.ADAPTER, name=f"{(earlier or base).name}-{params.token}", kind=ModelKind.ADAPTER)
        return Result((kept,), report)


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


def _inputs(inputs: Sequence[InputModel], params: MuseumParams) -> tuple[InputModel | None, InputModel]:
    models, base = parted(inputs, based=params.base)
    if base is None and len(models) == 1 and next(iter(models)).adapter_type is None:
        models, base = [], next(iter(models))
    if base is None or len(models) > 1:
        raise UsageError("museum takes a base alone for the first style, or one earlier version with --base BASE")
    if base.adapter_type is not None:
        raise UsageError(f"{base.name} is an adapter ({base.adapter_type}), which is no base")
    return (models[0] if models else None), base


def _open(context: Context, base: InputModel) -> Studio:
    from modelgrove_plugins.evaluate.live import ASKED, Live
    from modelgrove_plugins.preview.diffusers import open_painter

    with TemporaryDirectory(dir=context.temp) as folder:  # all is read when it is open
        painter = open_painter(base, Path(folder))
    if painter.pipeline not in ASKED:
        raise UsageError(f"{base.name} is a {painter.pipeline}; styles are learned on {', '.join(ASKED)}")
    live = Live(painter, base.name)
    live.network.requires_grad_(False)
    return Studio(painter, live, base.name)


def _read_version(earlier: InputModel | None, base: InputModel, studio: Studio, params: MuseumParams) -> Version:
    weights = {path: base.sha256(path) for path in base.files() if path.startswith(f"{studio.live.component}/")}
    digest = digest_of({path: sha256 for path, sha256 in weights.items() if path.endswith(".safetensors")})
    if earlier is None:
        return Version({}, {}, None, digest)
    read = read_museum(earlier)
    if read is None:
        raise UsageError(f"{earlier.name} has no style tokens: museum goes on from what it made itself")
    museum, tokens = read
    if museum.base != digest:
        raise UsageError(f"{earlier.name} was learned on another base than {base.name}: its denoiser has other files")
    if params.token in tokens:
        raise UsageError(f"{earlier.name} knows <{params.token}> already: choose another --token")
    if len(tokens) >= MOST:
        raise UsageError(f"{earlier.name} has {len(tokens)} styles, and no more than {MOST} are kept in one file")
    shared = {name: (one.down, one.up) for name, one in read_adapter(earlier).modules.items()}
    rank = max(down.shape[0] for down, _ in shared.values())
    if params.rank not in (None, rank):
        raise UsageError(f"{earlier.name} has rank {rank}, which later versions keep: leave --rank away")
    layers = dict(studio.live.network.named_modules())
    for name, (down, up) in shared.items():
        shape = getattr(getattr(layers.get(name), "weight", None), "shape", None)
        if shape != (up.shape[0], down.shape[1]):
            raise DataError(f"{earlier.name}: module {name} is no layer of {base.name} with its shape")
    parent = digest_of({path: earlier.sha256(path) for path in earlier.files()})
    return Version(shared, tokens, parent, digest)


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


def _museum(version: Version, token: Tensor, name: str) -> Museum:
    rows = {**version.tokens, name: token}
    styles = tuple(Style(token=one, sha256=hash_of(row)) for one, row in rows.items())
    return Museum(styles=styles, base=version.base, parent=version.parent)


def _write(context: Context, component: str, training: Training, museum: Museum, name: str) -> tuple[str, ...]:
    """The LoRA as diffusers loads it, and beside it the tokens; diffusers refuses a LoRA file with other tensors."""
    import torch

    writer = AdapterWriter(context, "diffusers", torch.float32, {}, {component})
    for module, (down, up) in training.shared.items():
        writer.add(Factors(module, component, (), down.detach(), up.detach()))
    tokens = context.writer(FILE, {"format": "pt", KEY: museum.model_dump_json()})
    for one, row in {**training.version.tokens, name: training.token.detach()}.items():
        tokens.add(PREFIX + one, row)
    return (*writer.close(), FILE)
