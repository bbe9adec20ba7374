"""The damage that adapters do to each other, measured on their base: its denoiser answers with each and with each pair.

The base paints a few pictures, and every call of its denoiser is kept. All calls are answered with each adapter, which
gives its effect, the change of the answers; then with each pair. The damage of b on a is how much of a's effect changes
when b is there too: ‖(y_ab − y_0) − (y_a − y_0)‖ / ‖y_a − y_0‖. N adapters cost N(N + 1)/2 passes over the calls.
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

PROMPTS = ("a red apple", "a sleeping cat", "a sailing boat on the sea", "a snowy mountain")
STEPS = 6


def measure(
    context: Context, base: InputModel, files: Sequence[AdapterFile[Update]], weights: Sequence[float],
    prompts: Sequence[str],
) -> Mapping[tuple[int, int], float]:  # fmt: skip
    """(i, j) → the damage of adapter j on adapter i, at their weights.

    Raises:
        UsageError: the base cannot paint, or an adapter fits no layer of it.
        DataError: a file is broken.
    """
    import torch

    from modelgrove_kernels.calls import output_of, recorded
    from modelgrove_plugins.preview.diffusers import PreviewParams, open_painter
    from modelgrove_plugins.preview.fusing import fuse
    from modelgrove_plugins.preview.painter import denoiser_of

    with TemporaryDirectory(dir=context.temp) as folder:  # all is read when it is open
        painter = open_painter(base, Path(folder))
    network = painter.networks[denoiser_of(painter, base.name)]
    wish = PreviewParams(prompts=tuple(prompts), steps=STEPS)
    with recorded(network) as calls:
        painter.paint([(prompt, seed) for seed, prompt in enumerate(prompts)], wish, lambda _done: None)

    def effect(*places: int) -> Tensor:
        with torch.inference_mode(), ExitStack() as undo:
            for place in places:
                fuse(painter.networks, files[place], weights[place], undo)
            answers = [output_of(network(*call.positional, **call.named)) - call.output for call in calls]
            return torch.cat([answer.flatten() for answer in answers])

    total = len(files) * (len(files) + 1) // 2
    alone: list[Tensor] = []
    for place in range(len(files)):
        context.progress(0.5 + 0.5 * place / total, f"the base answers with {files[place].name}")
        alone.append(effect(place))
    found: dict[tuple[int, int], float] = {}
    for number, (i, j) in enumerate(combinations(range(len(files)), 2), len(files)):
        context.progress(0.5 + 0.5 * number / total, f"the base answers with {files[i].name} and {files[j].name}")
        both = effect(i, j)
        for one, other in ((i, j), (j, i)):
            own = float(alone[one].norm())
            found[one, other] = float((both - alone[one]).norm()) / own if own else 0.0
    return found
