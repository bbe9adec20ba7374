"""What people do to weights, and what an adversary does: to see which marks and claims survive it.

Every attack writes a whole model of the same form, dense, so that all else in the hub can look at it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field, field_validator

from modelgrove_hub.contracts import API, Context, InputModel, Kind, LazyTensor, Output, Params, Picture, Result
from modelgrove_hub.errors import UsageError
from modelgrove_hub.formats.quantized import KEY as PACKED
from modelgrove_hub.rewriting import rewrite
from modelgrove_hub.tables import Relation
from modelgrove_plugins.compress.targets import FLOATS
from modelgrove_plugins.evaluate.scoring import PICTURES, absolute
from modelgrove_plugins.verify.measuring import KEY

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_plugins.evaluate.live import Live
    from modelgrove_plugins.verify.alignment import Move, Units

Attacking = Literal["prune", "quantize", "fine-tune", "average", "overwrite", "svd", "permute", "rescale"]
Change = Callable[[LazyTensor], "Tensor"]
"""A tensor → its values after the attack, in any dtype."""
_LEVELS, _BATCH = (0.1, 0.3, 0.5, 0.7, 0.9), 16


class AttackParams(Params):
    """Which attack, and how hard."""

    kind: Attacking = Field(description="What is done to the weights.")
    sparsity: float = Field(0.7, gt=0, lt=1, description="prune: share of each matrix's weights that become zero.")
    bits: Literal[8, 4, 3, 2] = Field(4, description="quantize: rounded to so many bits, and written dense.")
    steps: int = Field(100, ge=1, description="fine-tune: steps of AdamW on the denoising loss.")
    rate: float = Field(1e-4, gt=0, description="fine-tune: its learning rate.")
    pictures: Path | None = Field(None, description=f"fine-tune: {PICTURES}")
    key: str = Field("", pattern="^([0-9a-f]{64})?$", description=f"overwrite: {KEY}")
    margin: float = Field(4.0, gt=0, le=100, description="overwrite: strength of the second mark.")
    rank: int | None = Field(None, ge=1, description="svd: largest rank of a LoRA's products; unset: as it is.")
    factor: float = Field(
        4.0, description="rescale: largest factor of a hidden unit; of an adapter its strength, negative too."
    )

    @field_validator("pictures")
    @classmethod
    def _absolute(cls, pictures: Path | None) -> Path | None:
        return None if pictures is None else absolute(pictures)

    @field_validator("factor")
    @classmethod
    def _finite(cls, factor: float) -> float:
        if not 0 < abs(factor) < float("inf"):
            raise ValueError("a factor is a finite number, and not zero")
        return factor


class Attack:
    """Change weights as fine-tuning, compression, merging and removal of marks do."""

    name: ClassVar[str] = "attack"
    kind: ClassVar[Kind] = Kind.EDITOR
    api: ClassVar[int] = API
    summary: ClassVar[str] = (
        "Attack a mark: fine-tune, prune, quantize, average, overwrite, re-factor, permute, rescale."
    )
    paper: ClassVar[str] = ""
    Params: ClassVar[type[Params]] = AttackParams

    def run(self, context: Context, params: AttackParams) -> Result:
        """Write the attacked model; report how far its weights are from the attacked one's.

        Raises:
            UsageError: the attack is not for such a model, or something that it needs is not given.
            DataError: a value is not finite.
        """
        model = context.inputs[0]
        if PACKED in model.metadata():
            raise UsageError(f"model {model.name} is packed: export it as dense first")
        if len(context.inputs) > 1 and params.kind != "average":
            raise UsageError(f"{params.kind} takes one model; average takes several")
        if params.kind == "overwrite":
            return _overwrite(context, params)
        change, told = _ATTACKS[params.kind](context, model, params)
        moved, energy = 0.0, 0.0

        def attacked(tensor: LazyTensor) -> Tensor:
            nonlocal moved, energy
            before = tensor.read()
            if tensor.dtype not in FLOATS:
                return before
            after = change(tensor).to(before.dtype)
            moved += float((after.double() - before.double()).square().sum())
            energy += float(before.double().square().sum())
            return after

        files = rewrite(context, model, attacked, model.metadata())
        report = {"attack": params.kind, "change": float(f"{(moved / energy) ** 0.5 if energy else 0.0:.3e}"), **told}
        return Result((Output(files, _RELATIONS.get(params.kind, Relation.EDIT)),), report)


def _prune(_context: Context, _model: InputModel, params: AttackParams) -> tuple[Change, dict[str, Any]]:
    """The smallest of each matrix."""
    from modelgrove_plugins.compress.pruning import largest

    def change(tensor: LazyTensor) -> Tensor:
        values = tensor.read()
        if len(tensor.shape) < 2:
            return values
        return values * largest(values.abs().float().view(1, -1), params.sparsity).view(values.shape)

    return change, {"sparsity": params.sparsity}


def _quantize(_context: Context, _model: InputModel, params: AttackParams) -> tuple[Change, dict[str, Any]]:
    """Round to nearest, as `compress --method rtn` does."""
    from modelgrove_plugins.verify.measuring import rounded_to

    return rounded_to(params.bits), {"bits": params.bits}


def _fine_tune(context: Context, model: InputModel, params: AttackParams) -> tuple[Change, dict[str, Any]]:
    """Train the denoiser on pictures with captions; each step sees sixteen of them at one of five times."""
    from modelgrove_plugins.evaluate.live import Live
    from modelgrove_plugins.evaluate.pictures import read_pictures
    from modelgrove_plugins.preview.diffusers import open_painter

    if params.pictures is None:
        raise UsageError("fine-tune needs --pictures, a folder of pictures with captions")
    if model.adapter_type is not None:
        raise UsageError(f"{model.name} is an adapter: fine-tune trains the denoiser of a checkpoint")
    pictures = read_pictures(params.pictures)
    with TemporaryDirectory(dir=context.temp) as folder:
        live = Live(open_painter(model, Path(folder)), model.name)
    losses = _trained(context, live, pictures, params)
    state = live.network.state_dict()
    told = {"steps": params.steps, "loss_first": losses[0], "loss_last": losses[-1]}

    def change(tensor: LazyTensor) -> Tensor:
        folder, _, name = tensor.name.partition("/")
        return state[name].reshape(tensor.shape) if folder == live.component and name in state else tensor.read()

    return change, told


def _trained(context: Context, live: Live, pictures: Sequence[Picture], params: AttackParams) -> list[float]:
    """Steps of AdamW on the network in memory; the loss of each, as a share of the answers' energy."""
    import torch

    from modelgrove_kernels.calls import output_of, picked

    network = live.network
    parameters = [parameter.requires_grad_() for parameter in network.parameters()]
    optimizer = torch.optim.AdamW(parameters, params.rate)
    calls, generator = live.ask(pictures, _LEVELS, context.seed % 2**31), context.generator()
    losses = []
    for step in range(params.steps):
        context.progress(0.8 * step / params.steps, f"step {step + 1} of {params.steps}")
        call = picked(calls, _BATCH, generator)
        error = (output_of(network(*call.positional, **call.named)) - call.output).square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(error)
        optimizer.step()
        losses.append(float(f"{float(error.detach()) / float(call.output.square().mean()):.4e}"))
    return losses


def _average(context: Context, model: InputModel, _params: AttackParams) -> tuple[Change, dict[str, Any]]:
    """The mean of all models: a merge of two by halves, or a collusion of copies."""
    from modelgrove_plugins.merge.mixing import matching

    if len(context.inputs) < 2:
        raise UsageError("average needs two models or more")
    if any(one.adapter_type is not None for one in context.inputs):
        raise UsageError("average is for checkpoints: merge adapters with `modelgrove merge`")
    columns = [matching(one, model) for one in context.inputs]

    def change(tensor: LazyTensor) -> Tensor:
        total = sum(known[tensor.name].read().float() for known in columns)
        return cast("Tensor", total) / len(columns)

    return change, {"models": [one.name for one in context.inputs]}


def _svd(context: Context, model: InputModel, params: AttackParams) -> tuple[Change, dict[str, Any]]:
    """Write each product by its singular value decomposition: other factors, the same adapter where no rank is cut.

    Ranks that are cut are zeros, so that the file keeps its shapes.
    """
    import torch

    from modelgrove_kernels.lowrank import LowRank, canonical, truncate
    from modelgrove_plugins.verify.reading import factors_of

    if model.adapter_type is None:
        raise UsageError(f"{model.name} is no adapter: svd writes the factors of a LoRA anew")
    new: dict[str, Tensor] = {}
    for target in factors_of(model).values():
        factors = target.read()
        found = truncate(canonical(LowRank(factors.up, factors.down)), params.rank or target.rank).result.factors()
        down, up = torch.zeros_like(factors.down), torch.zeros_like(factors.up)
        down[: found.rank], up[:, : found.rank] = found.down, found.up / (target.scale or 1.0)
        new[target.down.name], new[target.up.name] = down.reshape(target.down.shape), up.reshape(target.up.shape)
    context.progress(0.0, "factored")
    return lambda tensor: new[tensor.name] if tensor.name in new else tensor.read(), {"rank": params.rank}


def _permute(context: Context, model: InputModel, _params: AttackParams) -> tuple[Change, dict[str, Any]]:
    """Give hidden units other places, inside the blocks in which that changes nothing."""
    import torch

    generator = context.generator()

    def moves(units: Units) -> list[Move]:
        from modelgrove_plugins.verify.alignment import Move

        starts = range(0, units.count, units.block)
        order = torch.cat([start + torch.randperm(units.block, generator=generator) for start in starts])
        return [Move(side, order, torch.ones(units.count)) for side in units.sides]

    return _rearranged(model, moves)


def _rescale(context: Context, model: InputModel, params: AttackParams) -> tuple[Change, dict[str, Any]]:
    """Scale hidden units up in one layer and down in the next; or an adapter's strength."""
    import torch

    if model.adapter_type is not None:
        from modelgrove_plugins.verify.reading import factors_of

        ups = {target.up.name for target in factors_of(model).values()}
        return lambda tensor: tensor.read() * (params.factor if tensor.name in ups else 1.0), {"factor": params.factor}
    generator = context.generator()

    def moves(units: Units) -> list[Move]:
        from modelgrove_plugins.verify.alignment import Move

        if not units.up:
            return []
        factor = abs(params.factor) ** (2 * torch.rand(units.count, generator=generator) - 1)
        stay = torch.arange(units.count)
        return [
            *(Move(side, stay, factor) for side in units.up), *(Move(side, stay, 1 / factor) for side in units.down)
        ]  # fmt: skip

    return _rearranged(model, moves)


def _rearranged(model: InputModel, moves_of: Callable[[Units], list[Move]]) -> tuple[Change, dict[str, Any]]:
    from modelgrove_plugins.verify.alignment import dense_tensors, rearranged, units_of

    by_tensor: dict[str, list[Move]] = {}
    if model.adapter_type is not None:
        raise UsageError(f"{model.name} is an adapter: its base decides the order of hidden units")
    count = 0
    for units in units_of(dense_tensors(model)):
        moves = moves_of(units)
        count += units.count if moves else 0
        for move in moves:
            by_tensor.setdefault(move.side.tensor, []).append(move)
    if not count:
        raise UsageError(f"model {model.name} has no hidden units that are known: it is not named as diffusers does")

    def change(tensor: LazyTensor) -> Tensor:
        values = tensor.read()
        return rearranged(values, by_tensor[tensor.name]) if tensor.name in by_tensor else values

    return change, {"hidden_units": count}


def _overwrite(context: Context, params: AttackParams) -> Result:
    """A second mark of another key."""
    from modelgrove_plugins.verify.mark import MarkParams, WeightMark

    if not params.key:
        raise UsageError("overwrite needs --key, the key of the second mark")
    wanted = MarkParams(key=params.key, margin=params.margin, fidelity=False)
    result = WeightMark().run(context, wanted)
    report = {"attack": params.kind, "change": result.report["change"]["relative"], "margin": params.margin}
    return Result(result.outputs, report)


_ATTACKS: dict[str, Callable[[Context, InputModel, AttackParams], tuple[Change, dict[str, Any]]]] = {
    "prune": _prune,
    "quantize": _quantize,
    "fine-tune": _fine_tune,
    "average": _average,
    "svd": _svd,
    "permute": _permute,
    "rescale": _rescale,
}
_RELATIONS = {"fine-tune": Relation.FINETUNE, "average": Relation.MERGE}
