"""Model cards as HTML that is safe to show: CommonMark with tables, and of strangers' HTML only what does no harm."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from markupsafe import Markup

from modelgrove_hub.web.render import model_url

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

LONGEST = 200_000
"""Characters of a card that are shown: what is longer would take seconds."""
_TAGS = {
    "a", "abbr", "b", "blockquote", "br", "code", "dd", "del", "details", "div", "dl", "dt", "em", "h2", "h3", "h4",
    "h5", "h6", "hr", "i", "img", "kbd", "li", "ol", "p", "pre", "s", "small", "span", "strong", "sub", "summary",
    "sup", "table", "tbody", "td", "th", "thead", "tr", "ul",
}  # fmt: skip
_ATTRIBUTES = {"a": {"href", "title"}, "img": {"src", "alt", "title"}, "ol": {"start"}, "td": {"colspan"}}
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp")
_HEADING = re.compile(r"<(/?)h([1-5])\b")


def card_html(text: str, name: str, paths: Collection[str]) -> Markup:
    """The card of model `name`, whose files are `paths`: images are only from these, and links vouch for nobody."""
    import nh3

    raw = _parser().render(text[:LONGEST])
    # The page has the one first heading.
    lowered = _HEADING.sub(lambda found: f"<{found[1]}h{int(found[2]) + 1}", raw)

    def allowed(tag: str, attribute: str, value: str) -> str | None:
        if tag == "img" and attribute == "src":
            return _own_picture(value, name, paths)
        if tag == "a" and attribute == "href" and not re.match(r"(?i)(https?:|mailto:|#)", value):
            return model_url(name, "files")  # a path in the model
        return value

    clean = nh3.clean(
        lowered, tags=_TAGS, attributes=_ATTRIBUTES, attribute_filter=allowed,
        url_schemes={"http", "https", "mailto"}, link_rel="nofollow noopener noreferrer",
    )  # fmt: skip
    return Markup(clean)  # noqa: S704  (sanitised above)


def _own_picture(source: str, name: str, paths: Collection[str]) -> str | None:
    path = unquote(source).removeprefix("./")
    if path not in paths or not path.lower().endswith(_PICTURES):
        return None
    return f"/{quote(name)}/resolve/main/{quote(path)}"


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": True, "maxNesting": 20}).enable(["table", "strikethrough"])
