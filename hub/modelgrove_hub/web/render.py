"""Templates: everything a page shows is escaped, but what `web` itself drew or sanitised."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from importlib.resources import files
from typing import Any
from urllib.parse import quote, urlencode

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.exceptions import HTTPException

from modelgrove_hub.api.access import Caller, caller_of
from modelgrove_hub.tables import now

THEME = "modelgrove_theme"
THEMES = ("auto", "light", "dark")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_CODE = re.compile(r"`([^`\n]+)`")
_AGES = ((86_400 * 365, "y"), (86_400 * 30, "mo"), (86_400, "d"), (3600, "h"), (60, "min"))


def page(request: Request, template: str, status: int = 200, **context: Any) -> HTMLResponse:
    """A page of the hub, with what all pages show around it."""
    theme = request.cookies.get(THEME, "auto")
    around = {
        "request": request, "caller": _caller(request), "is_open": request.app.state.open,
        "theme": theme if theme in THEMES else "auto", "path": request.url.path, "here": here(request),
    }  # fmt: skip
    headers = {"Vary": "Cookie, HX-Request", "Cache-Control": "no-cache"}
    return HTMLResponse(environment().get_template(template).render(around | context), status, headers)


def here(request: Request) -> str:
    """Path and query of the request."""
    query = request.url.query
    return request.url.path + (f"?{query}" if query else "")


def model_url(name: str, part: str = "") -> str:
    """Where a model's page is."""
    return f"/m/{quote(name)}" + (f"/{part}" if part else "")


def with_query(request: Request, **changes: str | None) -> str:
    """The page's own address with other values in its query; None takes one out."""
    query = {key: value for key, value in request.query_params.items() if value and key not in changes}
    query |= {key: value for key, value in changes.items() if value}
    return request.url.path + (f"?{urlencode(query)}" if query else "")


@cache
def environment() -> Environment:
    """The templates, which escape all values."""
    made = Environment(
        loader=PackageLoader("modelgrove_hub.web"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {
        "size": size,
        "ago": ago,
        "when": when,
        "compact": compact,
        "json": as_json,
        "figure": figure,
        "coded": coded,
    }
    made.globals |= {"asset": asset, "model_url": model_url, "with_query": with_query, "quote": quote}
    return made


@cache
def asset(name: str) -> str:
    """The address of a static file, another one whenever its content is."""
    content = (files("modelgrove_hub.web") / "static" / name).read_bytes()
    return f"/static/{name}?v={hashlib.sha256(content).hexdigest()[:10]}"


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in _UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"


def compact(count: int) -> str:
    """A large number in three digits: 7.57 M."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return str(count)


def ago(moment: datetime | None) -> str:
    """How long ago it was."""
    if moment is None:
        return "–"
    seconds = (now() - moment).total_seconds()
    for length, unit in _AGES:
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return "just now"


def when(moment: datetime | None) -> str:
    """A moment in UTC."""
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC") if moment else "–"


def figure(value: Any) -> str:
    """A measured number in four digits; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def coded(text: str) -> Markup:
    """Text with what stands between backticks as code."""
    return Markup(_CODE.sub(r"<code>\1</code>", str(escape(text))))  # noqa: S704  (escaped first)


def as_json(value: Mapping[str, Any] | Any) -> str:
    """Indented JSON, to be read."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


def _caller(request: Request) -> Caller:
    try:
        return caller_of(request)
    except HTTPException:  # a cookie with a token that was revoked: the page says how to sign in
        return Caller("", frozenset(), known=False)
