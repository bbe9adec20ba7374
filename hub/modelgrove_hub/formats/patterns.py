"""The small pattern language that signatures are written in.

`#` is a number, `<0-18>` a number in that range, `*` anything without a dot, `**` anything at
all, `{a,b}` one of these (they may hold dots and `#`, but no braces). All else stands for itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

_TOKEN = re.compile(r"\{([^{}]*)\}|<(\d+)-(\d+)>|\*\*|\*|#")
_WEIGHT = re.compile(r"\.(weight|\{weight,[^{}]*\})$")


def is_literal(pattern: str) -> bool:
    """Whether the pattern stands for exactly one name."""
    return _TOKEN.search(pattern) is None


@cache
def any_of(patterns: tuple[str, ...], *, flat: bool = False) -> re.Pattern[str]:
    """A regular expression for names that fit one of `patterns`; use its `fullmatch`.

    With `flat` the names are kohya's, where every dot has become an underscore.
    """
    return re.compile("|".join(_translate(pattern, flat) for pattern in patterns) or r"(?!)")


def module_patterns(patterns: Iterable[str]) -> tuple[str, ...]:
    """Patterns of tensor names → patterns of the modules that own a weight."""
    return tuple(_WEIGHT.sub("", pattern) for pattern in patterns if _WEIGHT.search(pattern))


def _translate(pattern: str, flat: bool) -> str:
    out: list[str] = []
    end = 0
    for token in _TOKEN.finditer(pattern):
        out += [_plain(pattern[end : token.start()], flat), _wild(token, flat)]
        end = token.end()
    return "".join([*out, _plain(pattern[end:], flat)])


def _wild(token: re.Match[str], flat: bool) -> str:
    text = token.group()
    if text == "#":
        return r"\d+"
    if text == "**":
        return ".*"
    if text == "*":
        return r"[^.]*"
    if text[0] == "<":
        return f"(?:{'|'.join(map(str, range(int(token[2]), int(token[3]) + 1)))})"
    return f"(?:{'|'.join(_translate(choice, flat) for choice in token[1].split(','))})"


def _plain(text: str, flat: bool) -> str:
    return re.escape(text.replace(".", "_") if flat else text)
