"""Make strangers' texts fit to be shown and stored."""

from __future__ import annotations


def readable(text: str, most: int = 2000) -> str:
    """A stranger's text, cut to `most` characters and without those that a database or terminal cannot take."""
    return "".join(sign if sign.isprintable() or sign == "\n" else " " for sign in text[:most]).strip()


def one_line(text: str, most: int = 2000) -> str:
    r"""A text as one line that any terminal and JSON can take: what is not printable is written as `\n`, `\x1b`…"""
    cut = text if len(text) <= most else f"{text[:most]}…"
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in cut)
