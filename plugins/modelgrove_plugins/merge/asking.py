"""The damage that adapters do to each other, measured on their base: its denoiser answers with each and each pair.

The base paints a few pictures of what each adapter is asked for by, without guidance, so that all calls of its denoiser
are under those words; the calls are kept. They are answered with the adapter, which gives its effect, the change of the
answers; then with it and another one. The damage of b on a is how much of a's effect changes when b is there too:
‖(y_ab − y_0) − (y_a − y_0)‖ / ‖y_a − y_0‖. N adapters cost N² passes over the calls of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from modelgrove_hub.contracts import Context, InputModel

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_hub.formats.adapters import AdapterFile
    from modelgrove_hub.formats.updates import Update

PICTURES, STEPS = 4, 6


def measure(
    context: Context, base: InputModel, files: Sequence[AdapterFile[Update]], weights: Sequence[float],
    prompts: Sequence[Sequence[str]],
) -> Mapping[tuple[int, int], float]:  # fmt: skip
    """(i, j) → the damage of adapter j on adapter i, at their weights, under the prompts of i.

    Raises:
        UsageError: the base cannot paint, or an adapter fits no layer of it or is of another base.
        DataError: a file is broken.
    """
    import torch

    from modelgrove_hub.formats.sara import check_base
    from modelgrove_kernels.calls import Call, output_of, recorded
    from modelgrove_plugins.preview.diffusers import PreviewParams, open_painter
    from modelgrove_plugins.preview.fusing import fuse
    from modelgrove_plugins.preview.painter import denoiser_of

    for file in files:
        check_base(file, base)
    with TemporaryDirectory(dir=context.temp) as folder:  # all is read when it is open
        painter = open_painter(base, Path(folder))
    network = painter.networks[denoiser_of(painter, base.name)]

    def painted(texts: Sequence[str]) -> list[Call]:
        wish = PreviewParams(prompts=tuple(texts), steps=STEPS, guidance_scale=1)
        with recorded(network) as calls:
            painter.paint([(texts[seed % len(texts)], seed) for seed in range(PICTURES)], wish, lambda _done: None)
        return calls

    def effects(places: Sequence[int], of: Sequence[int]) -> list[Tensor]:
        """The change of the answers to the calls of each adapter in `of`, with those at `places` in."""
        with torch.inference_mode(), ExitStack() as undo:
            for place in places:
                fuse(painter.networks, files[place], weights[place], undo)
            return [
                torch.cat(
                    [
                        (output_of(network(*call.positional, **call.named)) - call.output).flatten()
                        for call in calls[one]
                    ]
                )
                for one in of
            ]

    count = len(files)
    calls = [painted(texts) for texts in prompts]
    alone: list[Tensor] = []
    for place in range(count):
        context.progress(0.5 + 0.5 * place / count**2, f"the base answers with {files[place].name}")
        alone += effects([place], [place])
    found: dict[tuple[int, int], float] = {}
    for i, j in combinations(range(count), 2):
        done = (count + len(found)) / count**2
        context.progress(0.5 + 0.5 * done, f"the base answers with {files[i].name} and {files[j].name}")
        for one, other, both in zip((i, j), (j, i), effects([i, j], [i, j]), strict=True):
            own = float(alone[one].norm())
            found[one, other] = float((both - alone[one]).norm()) / own if own else 0.0
    return found
