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

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, field_validator

from modelgrove_hub.contracts import API, Context, InputModel, Kind, Output, Params, Result
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
    read_museum,
)
from modelgrove_hub.registry.digest import digest_of
from modelgrove_hub.tables import ModelKind, Relation
from modelgrove_plugins.evaluate.pictures import read_pictures
from modelgrove_plugins.evaluate.scoring import absolute
from modelgrove_plugins.merge.interference import rounded
from modelgrove_plugins.merge.merging import parted
from modelgrove_plugins.merge.style_training import RANK, Studio, Training, Version

if TYPE_CHECKING:
    from torch import Tensor


MOST_PICTURES = 1000


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
