"""What the layers of a base are given while it paints with an adapter: second moments of their inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from modelgrove_hub.contracts import Context, InputModel
from modelgrove_hub.formats.adapter_keys import flat

if TYPE_CHECKING:
    from torch import Tensor, nn

    from modelgrove_kernels.calibration import LayerInputs
    from modelgrove_plugins.merge.alignment import Site
    from modelgrove_plugins.merge.kept_moments import KeptMoments

MOST = 2 << 30
"""Bytes of moments that are kept at once; a larger network is watched in several rounds."""


class Moments:
    """E[x xᵀ] of the inputs x of each site's layer under each adapter, measured when it is asked for.

    Every adapter paints on its own words (`prompts_of`), alone and at a strength of one. What `kept` holds is not
    measured again.

    Raises:
        UsageError: the base cannot paint.
    """

    def __init__(
        self, context: Context, base: InputModel, adapters: Sequence[InputModel], sites: Sequence[Site],
        pictures: int, steps: int, kept: KeptMoments,
    ) -> None:  # fmt: skip
        from modelgrove_plugins.preview.diffusers import open_painter

        self._context, self._adapters, self._pictures, self._steps = context, adapters, pictures, steps
        with TemporaryDirectory(dir=context.temp) as folder:  # all is read when it is open
            self._painter = open_painter(base, Path(folder))
        self._kept = kept
        self._seen: dict[tuple[str, int], Tensor] = {}
        self._columns: dict[str, int] = {}
        self._waiting = self._measurable(sites)

    @property
    def measurable(self) -> frozenset[str]:
        """Names of the sites whose layers can be watched and were not asked for yet."""
        return frozenset(self._waiting)

    def take(self, site: str, places: Sequence[int]) -> list[Tensor] | None:
        """(n, n) for each of the adapters at `places`, columns as in the weight's file; None if it cannot be measured.

        Ask once for each site.
        """
        if site in self._waiting:
            self._measure(site)
        if not all(self._has(site, place) for place in places):
            return None
        return [self._taken(site, place) for place in places]

    def _has(self, site: str, place: int) -> bool:
        return (site, place) in self._seen or (site in self._columns and self._kept.holds(site, place))

    def _taken(self, site: str, place: int) -> Tensor:
        if (site, place) in self._seen:
            return self._seen.pop((site, place))
        return self._kept.read(site, place, self._columns[site])

    def _measurable(self, sites: Sequence[Site]) -> dict[str, tuple[str, str, tuple[int, ...]]]:
        """Site's name → where its layer is, and which adapters change it."""
        from modelgrove_kernels.calibration import LARGEST, columns_of
        from modelgrove_plugins.preview.fusing import layers_of

        layers = dict(layers_of(self._painter.networks))
        paths = {
            module: (component, path)
            for component, network in self._painter.networks.items()
            for path, module in network.named_modules()
        }
        found = {}
        for site in sites:
            layer = layers.get(flat(f"{site.component}.{site.module}")) or layers.get(flat(site.module))
            columns = columns_of(layer) if layer is not None else None
            fits = columns is not None and columns <= LARGEST and columns == site.shape[1]
            if layer is not None and fits:
                self._columns[site.name] = site.shape[1]
                places = tuple(place for place in sorted(site.targets) if not self._kept.holds(site.name, place))
                found[site.name] = (*paths[layer], places)
        return found

    def _measure(self, first: str) -> None:
        """The site that is wanted, and as many of the next as fit into memory."""
        room = MOST - sum(moment.nbytes for moment in self._seen.values())
        batch: list[str] = []
        for name in (first, *(name for name in self._waiting if name != first)):
            *_, places = self._waiting[name]
            room -= 4 * self._columns[name] ** 2 * len(places)
            if batch and room < 0:
                break
            batch.append(name)
        wanted = {name: self._waiting.pop(name) for name in batch}
        for place in range(len(self._adapters)):
            mine = {name: (component, path) for name, (component, path, places) in wanted.items() if place in places}
            for name, moment in self._watched(place, mine) if mine else ():
                self._seen[name, place] = moment
                self._kept.write(name, place, moment)

    def _watched(self, place: int, sites: dict[str, tuple[str, str]]) -> Iterator[tuple[str, Tensor]]:
        from modelgrove_hub.formats.updates import open_updates
        from modelgrove_kernels.calibration import captured
        from modelgrove_plugins.merge.wording import prompts_of
        from modelgrove_plugins.preview.diffusers import PreviewParams
        from modelgrove_plugins.preview.fusing import fuse

        model, networks = self._adapters[place], self._painter.networks
        prompts = prompts_of(model)
        wishes = [(prompts[seed % len(prompts)], seed) for seed in range(self._pictures)]
        said = f"watching the base paint {len(wishes)} pictures with {model.name}"
        with ExitStack() as undo:
            fuse(networks, open_updates(model), 1.0, undo)
            found: dict[str, dict[str, LayerInputs]] = {}
            for component in {component for component, _ in sites.values()}:
                paths = [path for owner, path in sites.values() if owner == component]
                found[component] = undo.enter_context(captured(networks[component], paths))
            params = PreviewParams(prompts=("calibration",), steps=self._steps)
            self._painter.paint(wishes, params, lambda done: self._context.progress(0.0, f"{said}: {done:.0%}"))
        for name, (component, path) in sites.items():
            seen = found[component][path]
            if seen.count:
                yield name, _in_file_order(seen.gram / seen.count, networks[component].get_submodule(path))


def _in_file_order(moment: Tensor, layer: nn.Module) -> Tensor:
    """Columns of a convolution are captured kernel position by position; files have the input channel first."""
    channels = int(getattr(layer, "in_channels", len(moment)))
    taps = len(moment) // channels
    return moment.view(taps, channels, taps, channels).permute(1, 0, 3, 2).reshape(moment.shape)
