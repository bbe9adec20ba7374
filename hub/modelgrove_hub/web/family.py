"""Family trees as SVG: ancestors to the left, descendants to the right; what was inferred is dashed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from modelgrove_hub.registry.lineage import Node
from modelgrove_hub.web.render import model_url

_WIDTH, _HEIGHT = 216, 34
_ACROSS, _DOWN = 300, 46
_SHOWN = 10
"""Relatives drawn of one model; the list below the picture has all."""
_DEEP = 4
_LONGEST = 29


@dataclass
class _Box:
    text: str
    href: str | None
    column: int
    row: float = 0.0
    css: str = ""


@dataclass
class _Line:
    left: _Box
    right: _Box
    label: str
    inferred: bool


class _Drawing:
    def __init__(self) -> None:
        self.boxes: list[_Box] = []
        self.lines: list[_Line] = []

    def grow(self, node: Node, own: _Box, side: int, first: float) -> float:
        """Draw the relatives of a node on one side from row `first` on; the row after the last."""
        relatives = (node.parents if side < 0 else node.children) if abs(own.column) < _DEEP else []
        row = first
        for number, relative in enumerate(relatives):
            if number == _SHOWN:
                self._add(_Box(f"and {len(relatives) - _SHOWN} more", None, own.column + side, row, "more"), own, side)
                row += 1
                break
            box = _Box(relative.name, model_url(relative.name), own.column + side, row)
            self._add(box, own, side, _label(relative), relative.inferred)
            row = max(row + 1, self.grow(relative, box, side, row))
        if relatives:
            rows = [
                line.left.row if side < 0 else line.right.row for line in self.lines if own in (line.left, line.right)
            ]
            own.row = (min(rows) + max(rows)) / 2 if own.column else own.row
        return row

    def _add(self, box: _Box, own: _Box, side: int, label: str = "", inferred: bool = False) -> None:
        self.boxes.append(box)
        self.lines.append(_Line(box, own, label, inferred) if side < 0 else _Line(own, box, label, inferred))

    def move(self, side: int, rows: float) -> None:
        for box in self.boxes:
            if box.column * side > 0:
                box.row += rows


def family_svg(root: Node, likely: Sequence[tuple[str, str]] = ()) -> Markup | None:
    """The family of a model; `likely` are ancestors by its tree, name and how sure; None if it has no relatives."""
    drawing = _Drawing()
    own = _Box(root.name, None, 0, 0.0, "own")
    known = {parent.name for parent in root.parents}
    left = drawing.grow(root, own, -1, 0.0)
    for name, said in likely:
        if name not in known:
            drawing._add(_Box(name, model_url(name), -1, left), own, -1, said, inferred=True)
            left += 1
    right = drawing.grow(root, own, 1, 0.0)
    if not drawing.boxes:
        return None
    tall = max(left, right, 1.0)
    drawing.move(-1, (tall - left) / 2)
    drawing.move(1, (tall - right) / 2)
    own.row = (tall - 1) / 2
    drawing.boxes.append(own)
    return _written(drawing, root.name)


def _written(drawing: _Drawing, name: str) -> Markup:
    leftmost = min(box.column for box in drawing.boxes)
    columns = max(box.column for box in drawing.boxes) - leftmost

    def at(box: _Box) -> tuple[float, float]:
        return 4 + (box.column - leftmost) * _ACROSS, 8 + box.row * _DOWN

    width = 8 + columns * _ACROSS + _WIDTH
    height = 16 + max(box.row for box in drawing.boxes) * _DOWN + _HEIGHT
    parts = []
    for line in drawing.lines:
        (x1, y1), (x2, y2) = at(line.left), at(line.right)
        x1, y1, y2 = x1 + _WIDTH, y1 + _HEIGHT / 2, y2 + _HEIGHT / 2
        middle = (x1 + x2) / 2
        css = "line inferred" if line.inferred else "line"
        curve = f"M{x1:.0f} {y1:.1f}C{middle:.0f} {y1:.1f} {middle:.0f} {y2:.1f} {x2:.0f} {y2:.1f}"
        parts.append(f'<path class="{css}" d="{curve}"/>')
        far = y1 if line.left.column < 0 else y2
        if line.label:
            place = f'x="{middle:.0f}" y="{far - 5:.1f}" text-anchor="middle"'
            parts.append(f'<text class="label" {place}>{escape(line.label)}</text>')
    for box in drawing.boxes:
        x, y = at(box)
        shown = box.text if len(box.text) <= _LONGEST else f"{box.text[: _LONGEST - 1]}…"
        inside = (
            f'<rect class="box {box.css}" x="{x:.0f}" y="{y:.1f}" width="{_WIDTH}" height="{_HEIGHT}" rx="6"/>'
            f'<text x="{x + 12:.0f}" y="{y + 21.5:.1f}"><title>{escape(box.text)}</title>{escape(shown)}</text>'
        )
        parts.append(f'<a href="{escape(box.href)}">{inside}</a>' if box.href else inside)
    label = f"Family of {name}: ancestors on the left, descendants on the right; the list below says the same"
    return Markup(  # noqa: S704  (names are escaped)
        f'<svg class="family" width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'role="group" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _label(node: Node) -> str:
    return f"{node.relation} {node.score:.2f}" if node.inferred else str(node.relation)
