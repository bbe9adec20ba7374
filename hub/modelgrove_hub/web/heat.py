"""Heat maps of layers as SVG: a column for each block, a row for each part in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from modelgrove_hub.registry.layers import Layer, Layers

MEASURES = {
    "change": "change, as a share of the base",
    "norm": "norm",
    "spread": "spread (root mean square)",
    "effective_rank": "effective rank",
}
_CELL = 17
_WIDEST = 40
_ROOM = 780
"""Pixels that a map's columns fill if they are few."""
_GAP = 2
_LEFT = 172
_TOP = 8
_BELOW = 96
_FEWEST = 4
"""Layers that make a map; of fewer the table says enough."""
_SHORT = {
    "down_blocks": "down", "up_blocks": "up", "mid_block": "mid", "attentions": "attn", "resnets": "res",
    "transformer_blocks": "tf", "single_transformer_blocks": "single", "downsamplers": "down", "upsamplers": "up",
    "input_blocks": "in", "output_blocks": "out", "middle_block": "mid", "layers": "layer",
}  # fmt: skip


@dataclass(frozen=True)
class HeatMap:
    """One component's map."""

    component: str
    svg: Markup
    low: float
    high: float


def measures_of(layers: Layers) -> list[str]:
    """What there is to colour by, the most telling first."""
    order = ("change", "norm", "spread", "effective_rank") if layers.of == "changes" else ("spread", "norm", "change")
    return [name for name in order if any(getattr(layer, name) is not None for layer in layers.layers)]


def heat_maps(layers: Layers, measure: str) -> list[HeatMap]:
    """A map for each component, the largest first."""
    by_component: dict[str, list[Layer]] = {}
    for layer in layers.layers:
        by_component.setdefault(layer.module.rpartition("/")[0], []).append(layer)
    largest = sorted(by_component.items(), key=lambda one: -len(one[1]))
    return [_map(component, found, measure) for component, found in largest if len(found) >= _FEWEST]


def _map(component: str, layers: Sequence[Layer], measure: str) -> HeatMap:
    blocks = list(dict.fromkeys(layer.block for layer in layers))
    roles = list(dict.fromkeys(layer.role for layer in layers))
    values = sorted(value for layer in layers if (value := getattr(layer, measure)) is not None)
    # A few outliers would leave all others pale.
    low = values[int(0.02 * (len(values) - 1))] if values else 0.0
    high = values[round(0.98 * (len(values) - 1))] if values else 0.0
    if measure != "spread":
        low = 0.0
    step, across = _CELL + _GAP, max(_CELL + _GAP, min(_WIDEST, _ROOM // len(blocks)))
    width, height = _LEFT + across * len(blocks) + 8, _TOP + step * len(roles) + _BELOW
    column = {block: _LEFT + across * number for number, block in enumerate(blocks)}
    row = {role: _TOP + step * number for number, role in enumerate(roles)}
    parts = [
        _cell(layer, measure, (column[layer.block], row[layer.role], across - _GAP), low, high) for layer in layers
    ]
    parts += [
        f'<text x="{_LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(_cut(role, 26))}</text>'
        for role, y in row.items()
    ]
    below = _TOP + step * len(roles) + 6
    parts += [
        f'<text transform="translate({x + across / 2 - 5:.0f} {below}) rotate(90)">{escape(_shorten(block))}</text>'
        for block, x in column.items()
    ]
    label = f"Heat map of {len(layers)} layers by {MEASURES[measure]}; the table below has the numbers"
    drawn = (
        f'<svg class="heat" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )
    return HeatMap(component, Markup(drawn), low, high)  # noqa: S704  (names are escaped)


def _cell(layer: Layer, measure: str, at: tuple[int, int, int], low: float, high: float) -> str:
    value = getattr(layer, measure)
    x, y, width = at
    place = f'x="{x}" y="{y}" width="{width}" height="{_CELL}" rx="3"'
    if value is None:
        return f'<rect class="none" {place}><title>{escape(layer.module)}: not known</title></rect>'
    share = min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5
    said = [f"{layer.module} ({'×'.join(map(str, layer.shape))})"]
    said += [f"{name.replace('_', ' ')} {seen:.4g}" for name in MEASURES if (seen := getattr(layer, name)) is not None]
    return f'<rect {place} fill-opacity="{0.07 + 0.93 * share:.2f}"><title>{escape(", ".join(said))}</title></rect>'


def _shorten(block: str) -> str:
    path = block.rpartition("/")[2]
    for long, short in _SHORT.items():
        path = re.sub(rf"(^|\.){long}(?=\.|$)", rf"\1{short}", path)
    return _cut(re.sub(r"\.(\d+)\.?", r" \1 ", path).strip() or "–", 17)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
