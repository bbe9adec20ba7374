"""A verb: a function of a hub that a command calls here or over HTTP, with the same answer.

It takes the hub first and keyword arguments after it, and returns pydantic models, so that its signature is the whole
contract: `api.rest` makes a route of it, `cli.place.ask` a request. What its path names is taken from there, one
argument that is a pydantic model is the body, all others are the query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Generic, Literal, ParamSpec, TypeVar

from pydantic import BaseModel

from modelgrove_hub.hub import Hub

Method = Literal["GET", "POST", "PATCH", "PUT", "DELETE"]
Scope = Literal["read", "write", "admin"]
P = ParamSpec("P")
R = TypeVar("R")
Item = TypeVar("Item")

MODULES = (
    "atlas", "experts", "facets", "jobs", "keys", "layers", "lineage", "models", "plugins", "previews", "search",
    "sources", "system", "tokens",
)  # fmt: skip
"""The modules of this package that hold verbs."""
_ATTRIBUTE = "__verb__"


@dataclass(frozen=True)
class Verb:
    """How a function is asked for over HTTP."""

    function: Callable[..., Any]
    method: Method
    path: str
    """Below /api/v1; `{model:path}` takes every form of reference, as "zoo-base", "12" or "local/zoo-base@4f2a"."""
    scope: Scope
    """What a token must allow for it."""
    status: int


class Page(BaseModel, Generic[Item]):
    """Some of a list, in its order."""

    items: list[Item]
    next: str | None = None
    """Give it as `after` for those that follow; None at the end."""


def verb(
    method: Method, path: str, scope: Scope = "read", status: int = 200
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declare a function of a hub as a verb; the function stays as it is."""

    def declare(function: Callable[P, R]) -> Callable[P, R]:
        setattr(function, _ATTRIBUTE, Verb(function, method, path, scope, status))
        return function

    return declare


def verb_of(function: Callable[..., Any]) -> Verb:
    """How a function that was declared as a verb is asked for."""
    found: Verb = getattr(function, _ATTRIBUTE)
    return found


def all_verbs() -> Iterator[Verb]:
    """Every verb there is."""
    for name in MODULES:
        module = import_module(f"modelgrove_hub.verbs.{name}")
        yield from (value.__verb__ for value in vars(module).values() if _is_own(value, module.__name__))


def _is_own(value: Any, module: str) -> bool:
    return hasattr(value, _ATTRIBUTE) and value.__module__ == module


__all__ = ["Hub", "Method", "Page", "Scope", "Verb", "all_verbs", "verb", "verb_of"]
