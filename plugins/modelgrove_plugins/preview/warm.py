"""Painters that stay in memory between the jobs of one process, so that a worker loads and packs a model once.

The least recently used ones go when all together are larger than the setting `warm_bytes`. A painter is off the shelf
while it is used, and what adapters change is put back bit by bit afterwards.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from threading import Lock
from typing import TYPE_CHECKING, Any

from modelgrove_hub.settings import settings
from modelgrove_kernels.modules import QuantConv2d, QuantLinear

if TYPE_CHECKING:
    from torch import nn

    from modelgrove_plugins.preview.painter import Painter

Loaded = tuple["Painter", dict[str, Any]]
"""A painter, and what the report says of its quantized layers."""
_shelf: OrderedDict[str, Loaded] = OrderedDict()
"""The least recently used first."""
_lock = Lock()


@contextmanager
def borrowed(key: str, load: Callable[[], Loaded]) -> Iterator[tuple[Loaded, ExitStack | None]]:
    """The painter called `key`, loaded if it is not on the shelf, and where to leave what undoes changes of it.

    Without such a place (None) it is too large to be kept, and changes may stay.
    """
    with _lock:
        found = _shelf.pop(key, None)
    loaded = found or load()
    if weight_of(loaded[0]) > settings().warm_bytes:
        yield loaded, None
        return
    with ExitStack() as undo:
        yield loaded, undo
    with _lock:  # only if nothing went wrong: who knows what a failed job left behind
        _shelf[key] = loaded
        while sum(weight_of(painter) for painter, _ in _shelf.values()) > settings().warm_bytes:
            _shelf.popitem(last=False)


def weight_of(painter: Painter) -> int:
    """Bytes of a painter's networks, packed layers among them."""
    return sum(map(_weight_of, chain.from_iterable(network.modules() for network in painter.networks.values())))


def _weight_of(module: nn.Module) -> int:
    if isinstance(module, QuantLinear | QuantConv2d):
        return module.nbytes
    return sum(tensor.nbytes for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
