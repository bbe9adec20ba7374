"""Cards as HTML: what people write stays readable, what strangers hide in it does no harm."""

from __future__ import annotations

import pytest

from modelgrove_hub.web.cards import LONGEST, card_html


def shown(text: str, *paths: str) -> str:
    return str(card_html(text, "me/model", paths))


def test_a_card_is_shown_below_the_heading_of_its_page():
    html = shown("# Title\n\n| a | b |\n|---|---|\n| 1 | ~~2~~ |\n\n1. one\n\n`code` **bold**")
    assert "<h2>Title</h2>" in html
    assert "<td><s>2</s></td>" in html
    assert "<code>code</code> <strong>bold</strong>" in html


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ("<script>alert(1)</script>", "alert"),
        ("<img src=x onerror=alert(1)>", "onerror"),
        ("[a](javascript:alert(1))", "href"),
        ("[a](JaVaScRiPt:alert(1))", "href"),
        ("[a](data:text/html,<script>)", "href"),
        ('<a href="vbscript:x" onclick="y">z</a>', "vbscript"),
        ("<svg onload=alert(1)>", "svg"),
        ('<div style="position:fixed">x</div>', "style"),
        ("<iframe src=https://evil.example></iframe>", "iframe"),
        ('<form action="/jobs"><button>x</button></form>', "form"),
        ('<p class="note bad" id="main">x</p>', "class"),
        ("<base href=//evil.example>", "base"),
        ("<math><mtext><style><img src=x onerror=alert(1)></style></mtext></math>", "onerror"),
        ("<style>*{display:none}</style>", "display"),
        ('<meta http-equiv="refresh" content="0;url=//x">', "meta"),
        ("![x](https://tracker.example/pixel.png)", "tracker"),
        ("![x](../../../etc/passwd)", "passwd"),
        ('<input autofocus onfocus="alert(1)">', "input"),
    ],
)
def test_what_could_do_harm_is_gone(text, gone):
    html = shown(text)
    assert gone not in html.lower()
    assert shown(f"words\n\n{text}").startswith("<p>words</p>")


def test_pictures_come_from_the_models_own_files_only():
    html = shown("![a](./pictures/a%20b.png) ![b](other.png) ![c](evil.svg)", "pictures/a b.png", "evil.svg")
    assert 'src="/me/model/resolve/main/pictures/a%20b.png"' in html
    assert html.count("src=") == 1


def test_links_vouch_for_nobody():
    html = shown("[a](https://example.org) [b](LICENSE)")
    assert '<a href="https://example.org" rel="nofollow noopener noreferrer">' in html
    assert 'href="/m/me/model/files"' in html


def test_a_huge_card_is_cut():
    assert len(shown("word " * LONGEST)) < 1.1 * LONGEST


def test_deep_nesting_ends():
    assert shown("> " * 20_000 + "x")
    assert shown("[" * 20_000)
