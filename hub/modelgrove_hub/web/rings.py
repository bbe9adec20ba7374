"""A quiet picture for a model that was never painted with: growth rings, drawn from its vector.

Models whose vectors point the same way get the same rings in the same colour, so what does alike looks alike.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache
from typing import TYPE_CHECKING

from markupsafe import Markup

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_RINGS = 6
_POINTS = 30
_WAVES = 4
_TRAITS = 2 + 2 * _WAVES
_HALF = 100


def rings(vector: bytes | None, name: str) -> Markup:
    """SVG for a model with this vector (float32), or for one that has none, by its name."""
    import numpy as np

    seed = np.frombuffer(vector, "<f4") if vector else _from_name(name)
    traits = _directions(len(seed)) @ (seed / max(float(np.linalg.norm(seed)), 1e-12)) * math.sqrt(len(seed))
    hue = round(math.degrees(math.atan2(float(traits[0]), float(traits[1]))) % 360)
    strength = "34%" if vector else "4%"
    angles = np.arange(_POINTS) * (2 * math.pi / _POINTS)
    wave = sum(
        float(np.tanh(traits[2 + 2 * k])) / (k + 1.5) * np.cos((k + 1) * angles + 3 * float(traits[3 + 2 * k]))
        for k in range(_WAVES)
    )
    paths = []
    for ring in range(_RINGS):
        share = (ring + 0.6) / _RINGS
        radii = 84 * share * (1 + 0.17 * share * wave)
        points = " ".join(
            f"{_HALF + r * math.cos(a):.0f} {_HALF + r * math.sin(a):.0f}" for r, a in zip(radii, angles, strict=True)
        )
        paths.append(f'<polygon points="{points}" stroke-opacity="{0.3 + 0.6 * share:.2f}"/>')
    colour = f"hsl({hue} {strength} 50%)"
    drawn = (
        '<svg class="rings" viewBox="0 0 200 200" aria-hidden="true" focusable="false">'
        f'<rect width="200" height="200" fill="{colour}" fill-opacity=".13"/>'
        f'<g fill="none" stroke="{colour}" stroke-width="3">{"".join(paths)}</g></svg>'
    )
    return Markup(drawn)  # noqa: S704  (numbers alone)


@cache
def _directions(width: int) -> Floats:
    import numpy as np

    return np.random.default_rng(7).standard_normal((_TRAITS, width)).astype(np.float32) / np.float32(math.sqrt(width))


def _from_name(name: str) -> Floats:
    import numpy as np

    digest = hashlib.sha256(name.encode()).digest()
    return np.frombuffer(digest, np.uint8).astype(np.float32) - 127.5
