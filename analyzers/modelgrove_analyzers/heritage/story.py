"""The difference between two models in plain words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import median

from modelgrove_analyzers.heritage.change import Change

_ATTENTION = re.compile(r"attn|attention|\b(to_)?[qkv](_proj)?\b|to_out")
_LOW_RANK = 128
"""The highest rank that a merged LoRA is taken to have."""
_UNRELATED = 0.3
"""Below this cosine, layers of one shape are as good as independent."""
_SHOWN = 3


def tell(
    changes: Sequence[Change], missing: Sequence[str], extra: Sequence[str], copy: str, names: tuple[str, str]
) -> str:
    """One or two sentences on what became of A (`names[0]`) in B (`names[1]`).

    `copy` is the sentence on a cast or quantization that explains every change, or empty.
    """
    whole = "" if missing or extra else "all "
    parts = [_on_values(changes, copy, whole)] if changes else [f"{names[0]} and {names[1]} have no tensor in common"]
    parts += [f"{names[1]} lacks {_listed(missing)} of {names[0]}"] if missing and changes else []
    parts += [f"{names[1]} has {_listed(extra)} more"] if extra and changes else []
    return "; ".join(parts)


def _on_values(changes: Sequence[Change], copy: str, whole: str) -> str:
    changed = [change for change in changes if change.changed]
    if not changed:
        return f"identical weights in {whole}{len(changes)} tensors{'' if whole else ' that both have'}"
    if copy:
        return copy
    layers = [change for change in changes if len(change.shape) >= 2] or list(changes)
    moved = [change for change in layers if change.changed]
    if moved and median(change.cosine for change in moved) < _UNRELATED:
        return f"the same shapes, but unrelated weights (median cosine {median(c.cosine for c in moved):.2f})"
    low = _low_rank(changed)
    if low:
        return low
    sizes = sorted(change.relative for change in (moved or changed))
    span = f"{_percent(median(sizes))} (median; {_percent(sizes[0])} to {_percent(sizes[-1])})"
    if len(moved) == len(layers):
        return f"full fine-tune: all {len(layers)} layers changed by {span}"
    if not moved:
        return f"only {len(changed)} biases and norms changed, by {span}"
    return f"{len(moved)} of {len(layers)} layers changed by {span}: {_listed([change.name for change in moved])}"


def _low_rank(changed: Sequence[Change]) -> str:
    """The sentence for a merged LoRA, or nothing: every change is a matrix of low rank above the rounding floor."""
    if any(change.rank is None for change in changed):
        return ""
    visible = [change for change in changed if change.rank]
    if not visible:
        return f"{len(changed)} layers differ by no more than rounding"
    if any((change.rank or 0) > min(_LOW_RANK, change.side // 4) or change.at_least for change in visible):
        return ""
    attention = sum(bool(_ATTENTION.search(change.name)) for change in visible)
    what = "attention layers" if attention == len(visible) else f"layers ({attention} of them attention)"
    rank = max(change.rank or 0 for change in visible)
    size = _percent(median(change.relative for change in visible))
    hidden = (
        f"; {len(changed) - len(visible)} more differ by no more than rounding" if len(visible) < len(changed) else ""
    )
    return f"a LoRA of rank ≤ {rank} was merged into {len(visible)} {what}, changing them by {size}{hidden}"


def with_article(precision: str) -> str:
    """ "an int8", "an fp16", "a bf16": as they are spoken."""
    return f"an {precision}" if precision[:1] in ("f", "i") else f"a {precision}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{len(names)} tensors ({shown}{', …' if len(names) > _SHOWN else ''})"


def _percent(share: float) -> str:
    return f"{share:.2g}×" if share >= 10 else f"{100 * share:.2g} %"
