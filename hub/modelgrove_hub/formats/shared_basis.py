"""What an adapter says of the columns that it was trained in: `modelgrove.basis` in its file's metadata, JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from modelgrove_hub.errors import DataError

BASIS = "modelgrove.basis"
"""The metadata key."""
MAX_COLUMNS = 8192
"""More than the narrowest layer of any network has that adapters are trained for."""
_MAX_TEXT = 4096


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class BasisColumns:
    """Columns [start, start + rank) of the basis that `base` (a tree) and `seed` make, the same in every layer."""

    base: Annotated[str, Field(min_length=1, max_length=260)]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    start: Annotated[int, Field(ge=0, lt=MAX_COLUMNS)]
    rank: Annotated[int, Field(ge=1, le=MAX_COLUMNS)]

    @property
    def stop(self) -> int:
        """The first column after them."""
        return self.start + self.rank

    def overlaps(self, other: BasisColumns) -> bool:
        """Whether both have a column in common. What bases of other seeds have in common is by chance."""
        return self.seed == other.seed and self.start < other.stop and other.start < self.stop

    def to_metadata(self) -> dict[str, str]:
        """The entry for a file's metadata."""
        return {BASIS: json.dumps(asdict(self), sort_keys=True)}


_COLUMNS = TypeAdapter(BasisColumns)


def columns_from(metadata: Mapping[str, str], where: str) -> BasisColumns | None:
    """The columns that a file's metadata declare; None if they say nothing of a basis.

    Raises:
        DataError: what they say is broken.
    """
    text = metadata.get(BASIS)
    if text is None:
        return None
    if len(text) > _MAX_TEXT:
        raise DataError(f"{where}: metadata {BASIS} has {len(text)} characters, more than any range needs")
    try:
        return _COLUMNS.validate_json(text)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise DataError(f"{where}: metadata {BASIS}: {place}{': ' if place else ''}{fault['msg']}") from None
