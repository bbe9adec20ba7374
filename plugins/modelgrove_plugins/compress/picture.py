"""Plots of what a compression lost: the SQNR of every layer, and the denoiser's error over timesteps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from PIL import Image, ImageDraw, ImageFont

Curve = Sequence[tuple[float, float]]
"""(timestep or sparsity, relative error), any order."""

_WIDTH, _HEIGHT = 960, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 30, 26
_TEXT, _LINE = 13, 18
_NAMED = 5
_COLOURS = {"int8": "#4c78a8", "int4": "#f58518", "lut": "#54a24b", "sparse": "#9d755d"}
_CURVES = ("#4c78a8", "#e45756", "#54a24b")
_GRID = "#dddddd"


def plot(layers: Sequence[Mapping[str, Any]], curves: Mapping[str, Curve] = MappingProxyType({})) -> Image.Image:
    """One picture: bars for the report's layers in file order, and below it the curves, if there are any.

    The layers with the lowest SQNR are numbered and named. A layer without an error has a bar to the top.
    """
    panels = [_bars(layers)]
    if any(error > 0 for curve in curves.values() for _, error in curve):
        panels.append(_lines(curves))
    sheet = Image.new("RGB", (_WIDTH, sum(panel.height for panel in panels)), "white")
    top = 0
    for panel in panels:
        sheet.paste(panel, (0, top))
        top += panel.height
    return sheet


def plot_sweeps(curves: Mapping[str, Curve], chosen: Mapping[str, float]) -> Image.Image:
    """Each component's error over its sparsity, (sparsity, error); a vertical line where it is pruned."""
    labels = {name: f"{name} at {chosen[name]:.0%}" if name in chosen else f"{name} kept" for name in curves}
    panel = _curves(
        {labels[name]: curve for name, curve in curves.items()},
        "Relative squared error of each component's output over its sparsity (lower is better)",
        lambda share: f"{share:.0%}",
    )
    places = [place for curve in curves.values() for place, _ in curve]
    for number, name in enumerate(curves):
        if name in chosen:
            across = (chosen[name] - min(places)) / ((max(places) - min(places)) or 1)
            panel.draw.line((*panel.at(across, 0), *panel.at(across, 1)), _CURVES[number % len(_CURVES)])
    return panel.image


class _Panel:
    """A titled frame with a scale on its left: x and y in [0, 1] inside it."""

    def __init__(self, title: str, below: int = 0) -> None:
        self.image = Image.new("RGB", (_WIDTH, _HEIGHT + below * _LINE), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(_TEXT)
        self.write((_LEFT, 6), title)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The pixel of a place in the frame; y grows upwards."""
        return (
            _LEFT + x * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - y * (_HEIGHT - _TOP - _BOTTOM),
        )

    def write(self, place: tuple[float, float], text: str, anchor: str = "la", colour: str = "black") -> None:
        self.draw.text(place, text, colour, self.font, anchor=anchor)

    def scale(self, ticks: Mapping[float, str]) -> None:
        """Horizontal lines at heights in [0, 1], with their labels."""
        for height, label in ticks.items():
            (left, line), (right, _) = self.at(0, height), self.at(1, height)
            self.draw.line((left, line, right, line), _GRID)
            self.write((left - 6, line), label, "rm")

    def legend(self, entries: Mapping[str, str]) -> None:
        """Coloured words, right-aligned beside the title."""
        right = float(_WIDTH - _RIGHT)
        for text, colour in reversed(list(entries.items())):
            self.write((right, 6), text, "ra", colour)
            right -= self.font.getlength(text) + 16


def _bars(layers: Sequence[Mapping[str, Any]]) -> Image.Image:
    worst = _worst(layers)
    panel = _Panel("SQNR of each packed layer in dB, in file order (higher is better)", below=len(worst))
    measured = [layer["sqnr_db"] for layer in layers if layer["sqnr_db"] is not None]
    step = 10 * max(1, math.ceil(max(measured, default=10) / 50))
    top = step * max(1, math.ceil(max(measured, default=step) / step))
    panel.scale({value / top: str(value) for value in range(0, top + 1, step)})
    panel.legend({name: colour for name, colour in _COLOURS.items() if any(x["layout"] == name for x in layers)})
    for place, layer in enumerate(layers):
        height = 1.0 if layer["sqnr_db"] is None else max(0.0, layer["sqnr_db"] / top)
        left, high = panel.at(place / len(layers), height)
        right, low = panel.at((place + 0.8) / len(layers), 0)
        panel.draw.rectangle((left, high, max(left, right), low), _COLOURS[layer["layout"]])
    for number, place in enumerate(worst, 1):
        _name(panel, number, place, layers)
    return panel.image


def _worst(layers: Sequence[Mapping[str, Any]]) -> list[int]:
    """Places of the layers with the lowest SQNR, the worst first."""
    measured = [place for place, layer in enumerate(layers) if layer["sqnr_db"] is not None]
    return sorted(measured, key=lambda place: float(layers[place]["sqnr_db"]))[:_NAMED]


def _name(panel: _Panel, number: int, place: int, layers: Sequence[Mapping[str, Any]]) -> None:
    x, y = panel.at((place + 0.4) / len(layers), 0)
    panel.write((x, y + 4), str(number), "ma")
    layer = layers[place]
    panel.write((_LEFT, _HEIGHT + (number - 1) * _LINE), f"{number}  {layer['sqnr_db']:.1f} dB  {layer['name']}")


def _lines(curves: Mapping[str, Curve]) -> Image.Image:
    title = "Relative squared error of the denoiser's output over timesteps (lower is better)"
    return _curves(curves, title, lambda time: f"t = {time:g}").image


def _curves(curves: Mapping[str, Curve], title: str, shown: Callable[[float], str]) -> _Panel:
    """Errors on a logarithmic scale of whole decades; an error of zero lies on the floor. `shown` labels both ends."""
    panel = _Panel(title)
    errors = [error for curve in curves.values() for _, error in curve if error > 0] or [1.0]
    places = [place for curve in curves.values() for place, _ in curve]
    low, high = math.floor(math.log10(min(errors))), math.ceil(math.log10(max(errors)))
    high = max(high, low + 1)
    panel.scale({(power - low) / (high - low): f"1e{power}" for power in range(low, high + 1)})
    first, last = min(places), max(places)
    span = (last - first) or 1
    for number, curve in enumerate(curves.values()):
        points = [
            panel.at((place - first) / span, (math.log10(max(error, 10**low)) - low) / (high - low))
            for place, error in sorted(curve)
        ]
        panel.draw.line(points, _CURVES[number % len(_CURVES)], width=2)
    panel.legend({label: _CURVES[number % len(_CURVES)] for number, label in enumerate(curves)})
    for x, end, anchor in ((0.0, first, "la"), (1.0, last, "ra")):
        left, bottom = panel.at(x, 0)
        panel.write((left, bottom + 4), shown(end), anchor)
    return panel
