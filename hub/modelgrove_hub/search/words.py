"""Words for what models show: things, places, people, shapes, colours and styles, shipped as text."""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def words() -> tuple[str, ...]:
    """The words, one a line in `words.txt`, each once."""
    return tuple((files("modelgrove_hub.search") / "words.txt").read_text("utf-8").splitlines())
