"""Names of models: "owner/name", in the characters that a Hugging Face client accepts too."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

from sqlmodel import Session, col, select

from modelgrove_hub.errors import UsageError
from modelgrove_hub.registry.database import take_turn
from modelgrove_hub.registry.digest import digest_of
from modelgrove_hub.tables import Model, Revision

OWNER = "local"
"""Owner of models whose place on disk names none."""
MAX_PART = 96
_SUFFIX = 8
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_FORBIDDEN = ("..", "--")
_ENDINGS = (".git", ".ipynb")
_LONGEST_INPUT = 1000


def check_name(name: str) -> str:
    """The name itself, if it is valid.

    Raises:
        UsageError: it is not; the message holds a valid one that is near.
    """
    parts = name.split("/")
    if len(parts) == 2 and all(_is_part(part) for part in parts):
        return name
    raise UsageError(
        f"{name!a} cannot be a model's name: write owner/name in letters, digits, '.', '_' and '-', "
        f"{MAX_PART} at most on each side, for example {clean_name(name)}"
    )


def clean_name(text: str) -> str:
    """A valid name that is as near to `text` (a title, or a path whose last two parts count) as can be.

    Letters of other scripts become Latin by their Unicode names, pictures the words they are
    called by, all else dashes. Different texts may give the same name; see `free_name`.
    """
    parts = [part for part in text[-_LONGEST_INPUT:].replace("\\", "/").split("/") if part.strip(". ")]
    name = _clean_part(parts[-1] if parts else "", "unnamed")
    owner = _clean_part(parts[-2], OWNER) if len(parts) > 1 else OWNER
    return f"{owner}/{name}"


def free_name(session: Session, wanted: str, files: Mapping[str, str]) -> str:
    """`wanted`, or `wanted` with some of the content's hash when a model of other content has that name.

    `files` maps paths to sha256. Content that is registered under one of these names keeps it. Until
    the caller's transaction ends nobody else takes the name.
    """
    take_turn(session)
    digest = digest_of(files)
    owner, name = wanted.split("/")
    for length in range(0, len(digest) + 1, _SUFFIX):
        suffix = f"-{digest[:length]}" if length else ""
        candidate = f"{owner}/{name[: MAX_PART - len(suffix)].rstrip('-.')}{suffix}"
        model = session.exec(select(Model).where(Model.name == candidate)).first()
        if model is None or _holds(session, model, digest):
            return candidate
    raise AssertionError("two models with the same sha256")


def _holds(session: Session, model: Model, digest: str) -> bool:
    query = select(Revision.id).where(col(Revision.model_id) == model.id, Revision.digest == digest)
    return session.exec(query).first() is not None


def _is_part(part: str) -> bool:
    allowed = _PART.fullmatch(part) is not None and not part.lower().endswith(_ENDINGS)
    return allowed and not any(pair in part for pair in _FORBIDDEN)


def _clean_part(text: str, fallback: str) -> str:
    latin = "".join(_latin(character) for character in unicodedata.normalize("NFKC", text))
    part = re.sub(r"-*\.-*", ".", re.sub(r"[^A-Za-z0-9._]+", "-", latin))
    part = re.sub(r"\.{2,}", ".", part).strip("-.")[:MAX_PART].strip("-.")
    while part.lower().endswith(_ENDINGS):
        part = part.rpartition(".")[0].strip("-.")
    return part or fallback


def _latin(character: str) -> str:
    """How a character is written in ASCII: "é" as e, "か" as ka, "🍎" as -red-apple-, "漢" as -6f22-."""
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    if plain:
        return plain
    kind, name = unicodedata.category(character), unicodedata.name(character, "").lower()
    if name.startswith("cjk ") or not name:
        return f"-{ord(character):x}-" if kind.startswith("L") else "-"
    if kind == "Lm":
        return ""  # marks that lengthen or soften the letter before
    if kind.startswith("L"):
        return name.partition(" with ")[0].split()[-1]
    return f"-{name.replace(' ', '-')}-" if kind == "So" else "-"
