"""Verb of layers: how large the weights of each layer are, or what an adapter changes in it."""

from __future__ import annotations

from modelgrove_hub.hub import Hub
from modelgrove_hub.registry.layers import Layers, read_layers
from modelgrove_hub.registry.models import find_revision
from modelgrove_hub.verbs.verb import verb


@verb("GET", "/layers/{model:path}")
def layers(hub: Hub, *, model: str) -> Layers:
    """The layers of a network with norm and spread, or of an adapter with the size and rank of what it changes.

    Raises:
        NotFoundError: there is no such model.
        UsageError: several are called so, or its method is no change of weights.
        UnsafeFileError: it is quarantined, so its files are not read.
        DataError: its files hold no tensors, or are damaged.
    """
    with hub.reading() as session:
        number = find_revision(session, model).id or 0
    return read_layers(hub, number)
