"""Is a key's mark in these weights? An exact test, its controls, and what may be claimed from it.

The null hypothesis is that the weights do not depend on the key. As the key was drawn at random, each bit then agrees
with a fair coin's chance, and the number of bits that agree is Binomial(n, ½), whatever the weights are: nothing is
calibrated. The p-value is of one reading of n bits; it is multiplied by everything else that was tried.

With a reference, the unmarked original, a second reading is made of what differs from it, after hidden units were put
into its order. A reference that shows the key itself is refused: aligned to it, every model would.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from modelgrove_hub.contracts import API, Context, InputModel, Kind, Params, Result
from modelgrove_hub.errors import UsageError
from modelgrove_plugins.verify.alignment import Aligned
from modelgrove_plugins.verify.measuring import (
    KEY,
    committed,
    measure,
    plain,
    read_bits,
    registered,
    told,
    wrong_keys,
)
from modelgrove_plugins.verify.reading import Matrix, carrying_slots, matrices_of

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_hub.keys import CommittedKey
    from modelgrove_kernels.lowrank import LowRank
    from modelgrove_kernels.weight_mark import MarkKey, Statistic
    from modelgrove_plugins.verify.measuring import Weight

REFUSED = 1e-3
"""A reference of a smaller p-value may hold the mark. One unmarked reference in a thousand is refused for nothing."""
_NULL = "the weights do not depend on the key, so each bit agrees by a fair coin: k is Binomial(n, 1/2)"
VERIFIED, NOTHING = "verified", "no evidence found"
AS_IT_IS, DIFFERENCE = "as it is", "difference from the reference"


class VerifyParams(Params):
    """The key, what else was tried, and how sure one wants to be."""

    key: str = Field(pattern="^[0-9a-f]{64}$", description=KEY)
    reference: bool = Field(False, description="The last input is the unmarked original.")
    alpha: float = Field(1e-6, gt=0, lt=1, description="False positives allowed, over everything that was tried.")
    users: int | None = Field(
        None, ge=1, description="Keys that were looked for, as one of each user; unset: all that were committed here."
    )
    tries: int = Field(
        2**40, ge=1, description="Keys that a claimant could have tried, where the key is younger than the model."
    )
    controls: int = Field(8, ge=1, le=10_000, description="Wrong keys that are looked for as well.")


class VerifyMark:
    """Look for the bits of a key in a network or an adapter."""

    name: ClassVar[str] = "weight-mark"
    kind: ClassVar[Kind] = Kind.VERIFIER
    api: ClassVar[int] = API
    summary: ClassVar[str] = "Whether a key's mark is in the weights: an exact test, with controls."
    paper: ClassVar[str] = "Uchida et al., Embedding Watermarks into Deep Neural Networks (ICMR 2017)"
    Params: ClassVar[type[Params]] = VerifyParams

    def run(self, context: Context, params: VerifyParams) -> Result:
        """Report the decision, and all that it rests on.

        Raises:
            NotFoundError: the key was not committed, or its secret is not here.
            UsageError: the reference shows the key, or is of no use for this model; or there is nothing to read.
            DataError: a value is not finite; the message names the tensor.
        """
        model, reference = _inputs(context, params)
        public, key, others = committed(params.key)
        keys = [key, *wrong_keys(context.seed, key.bits, params.controls)]
        views: dict[str, list[Statistic]] = {}
        unmarked = None
        if reference is not None:
            unmarked = _checked(context, reference, key)
        matrices = matrices_of(model)
        views[AS_IT_IS] = measure(context, keys, matrices, span=(0.1, 0.5 if reference else 1.0))
        units: dict[str, int] = {}
        if reference is not None:
            aligned = Aligned(context, model, reference)
            units = {"hidden_units": aligned.units, "moved": aligned.moved}
            views[DIFFERENCE] = measure(context, keys, matrices, _differences(model, reference, aligned), (0.6, 1.0))
        seen_at = registered(model)
        earlier = seen_at is not None and public.committed_at < seen_at
        # Whoever shows a key may have chosen it among all that were committed, or among all that could be made.
        users = params.users or others
        tried = {"views": len(views), "users": users, "keys": 1 if earlier else params.tries}
        hypotheses = tried["views"] * tried["users"] * tried["keys"]
        return Result(
            report={
                **_decided(key, views, hypotheses, params.alpha, early=earlier),
                "null_hypothesis": _NULL,
                "sample_size": key.bits,
                "tried": {**tried, "polarities": 2},
                "alpha": params.alpha,
                "thresholds": _thresholds(key.bits, params.alpha, hypotheses, users),
                "key": _key(public, earlier, seen_at.isoformat() if seen_at else None),
                "reference": {"name": reference.name, "sha256": _hashes(reference), **units} if reference else None,
                "controls": {
                    "unmarked_reference": unmarked,
                    "wrong_keys": {
                        view: [told(wrong, one) for wrong, one in zip(keys[1:], found[1:], strict=True)]
                        for view, found in views.items()
                    },
                },
                "matrices": len(matrices),
                "weights": views[AS_IT_IS][0].size,
                "versions": {package: version(package) for package in ("modelgrove", "torch")},
            }
        )


def _inputs(context: Context, params: VerifyParams) -> tuple[InputModel, InputModel | None]:
    wanted = 2 if params.reference else 1
    if len(context.inputs) != wanted:
        given = len(context.inputs)
        raise UsageError(f"one model is verified{', beside its reference' if params.reference else ''}, not {given}")
    model, reference = context.inputs[0], context.inputs[1] if params.reference else None
    if reference is not None and (model.adapter_type or reference.adapter_type):
        raise UsageError(
            "a reference is for checkpoints: an adapter is read from its products, which no change of order moves"
        )
    return model, reference


def _checked(context: Context, reference: InputModel, key: MarkKey) -> dict[str, Any]:
    """The key's reading of the reference, which must be nothing.

    Raises:
        UsageError: it is not.
    """
    (found,) = measure(context, [key], matrices_of(reference), plain, (0.0, 0.1), "reference:")
    if read_bits(key, found).p() <= REFUSED:
        raise UsageError(
            f"{reference.name} shows the key itself: a reference must be the unmarked original, for what is aligned to "
            "a marked model looks marked whatever it is"
        )
    return told(key, found)


def _differences(model: InputModel, reference: InputModel, aligned: Aligned) -> Weight:
    """What a matrix is less the reference's share in it, in units of its own size; whole where there is none."""
    theirs = {matrix.name: matrix for matrix in matrices_of(reference)}
    mine = carrying_slots(model)

    def difference(matrix: Matrix) -> tuple[Tensor | LowRank, float | None]:
        from modelgrove_kernels.weight_mark import rms

        slot, other = mine[matrix.name], theirs.get(matrix.name)
        values = aligned.read(slot.tensor.name, slot.tensor.read())
        weight = slot.part_of(values).reshape(slot.shape)
        if other is None or other.shape != matrix.shape:
            return weight, None
        origin = other.read()
        share = float((weight * origin).sum()) / max(float((origin * origin).sum()), 1e-30)  # type: ignore[operator]
        return weight - share * origin, rms(weight)  # type: ignore[operator]

    return difference


def _decided(
    key: MarkKey, views: dict[str, list[Statistic]], hypotheses: int, alpha: float, *, early: bool
) -> dict[str, Any]:
    """The better view, its p-value with and without what else was tried, and the words that it allows."""
    from modelgrove_kernels.weight_mark import POLARITIES, log10

    best = min(views, key=lambda view: read_bits(key, views[view][0]).p())
    reading = read_bits(key, views[best][0])
    corrected = reading.p(hypotheses)
    verified = corrected <= alpha
    return {
        "decision": VERIFIED if verified else NOTHING,
        "claim": _claim(verified, early),
        "view": best,
        "reading": told(key, views[best][0]),
        "corrected_p": float(corrected),
        "log10_corrected_p": round(log10(corrected), 2),
        "hypotheses": hypotheses * POLARITIES,
        "views": {view: told(key, found[0]) for view, found in views.items()},
    }


def _claim(verified: bool, early: bool) -> str:
    if not verified:
        return "none; that nothing was found is no evidence that nothing is there"
    if early:
        return "these weights derive from a release that was marked with this key, which was committed to before"
    return (
        "these weights hold the mark of this key; the key was not committed to before the model was registered here, "
        "so that keys which could have been tried are counted, and who was first is not shown"
    )


def _thresholds(bits: int, alpha: float, hypotheses: int, users: int) -> dict[str, int | None]:
    """Agreeing bits that are needed: in one reading, in one for each of the users, and with all that was tried here."""
    from modelgrove_kernels.weight_mark import POLARITIES, threshold

    counted = {"one_reading": 1, "users": users, "everything": hypotheses}
    return {name: threshold(bits, alpha, POLARITIES * count) for name, count in counted.items()}


def _key(public: CommittedKey, earlier: bool, seen_at: str | None) -> dict[str, Any]:
    return {
        "name": public.name,
        "commitment": public.id,
        "bits": public.bits,
        "committed_at": public.committed_at.isoformat(),
        "event": public.event,
        "model_registered_at": seen_at,
        "committed_before_the_model": earlier,
    }


def _hashes(model: InputModel) -> dict[str, str]:
    return {path: model.sha256(path) for path in sorted(model.files()) if path.endswith(".safetensors")}
