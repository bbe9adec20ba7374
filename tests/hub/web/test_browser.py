"""The pages in a real browser: the way from a search to a result, by keyboard, without JavaScript, and for all eyes."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("playwright", reason="pip install playwright")
from playwright.sync_api import Browser, Page, expect

AXE = Path(__file__).with_name("axe.min.js").read_text("utf-8")
GUITAR = "/m/local/guitar-0008e6a5"
PAGES = (
    "/", "/?q=violin", "/atlas", "/jobs", "/sources", "/plugins", "/plugins/merger.sum", "/system", "/signin",
    "/nowhere",
    GUITAR, *(f"{GUITAR}/{part}" for part in ("files", "layers", "family", "similar", "jobs", "actions")),
    f"{GUITAR}/actions/merger.orthogonal",
)  # fmt: skip
LONG = 60_000
ANYTHING = re.compile(".")


@pytest.fixture
def page(browser: Browser, grove: Any) -> Iterator[Page]:
    """A page that fails the test if a script fails or the content security policy refuses something."""
    context = browser.new_context(base_url=grove.url, viewport={"width": 1280, "height": 860})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened = context.new_page()
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    yield opened
    context.close()
    assert wrong == []


def test_from_a_search_to_a_painted_picture(page: Page, worker: None, wait_until: Any):
    page.goto("/")
    page.get_by_role("searchbox").fill("a string instrument played with a bow")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(r"\?q=a\+string"), timeout=LONG)
    expect(page.locator(".hit").first).to_contain_text("weights say")
    page.get_by_role("radio", name="Weights").check(force=True)
    expect(page).to_have_url(re.compile("by=weights"))
    page.get_by_role("link", name="local/guitar-0008e6a5").click()
    expect(page).to_have_url(re.compile(f"{GUITAR}$"))
    expect(page.locator("svg.heat rect").first).to_be_visible(timeout=LONG)  # taken in by htmx

    page.get_by_label("Prompt").fill("a picture of sks")
    page.get_by_role("spinbutton", name="Pictures").fill("2")
    page.get_by_role("button", name="Paint").click()
    expect(page).to_have_url(re.compile("/jobs/[0-9a-f]{32}"))
    # No reload: events tell the page that there is something new.
    page.evaluate("window.same = true")
    picture = page.locator(".gallery img")
    expect(picture).to_be_visible(timeout=LONG)
    wait_until(
        lambda: page.evaluate("document.querySelector('.gallery img').naturalWidth") > 32, "the picture is shown"
    )
    expect(page.locator(".state").first).to_have_text("done")
    assert page.evaluate("window.same")
    expect(page.get_by_text("modules matched").first).to_be_visible()

    page.get_by_role("link", name="local/guitar-0008e6a5").first.click()
    expect(page.locator(".gallery img")).to_have_attribute("alt", "Preview: a picture of sks")
    page.goto("/?q=guitar")
    assert page.locator(".hit img").count() == 1


def test_a_form_leads_to_a_new_model(page: Page, worker: None):
    page.goto("/m/local/zoo-base/actions")
    page.get_by_role("link", name=re.compile("^rtn")).click()
    page.get_by_label("Name of what is made").fill("me/by-browser")
    page.get_by_label("bits", exact=True).select_option("4")
    page.get_by_role("button", name="Give to the workers").click()
    page.get_by_role("link", name="me/by-browser").click(timeout=LONG)
    expect(page.get_by_role("heading", level=1)).to_contain_text("by-browser")
    expect(page.locator("svg.family")).to_contain_text("quantized")
    page.goto("/jobs")
    expect(page.get_by_role("row", name=re.compile("compressor.rtn"))).to_contain_text("me/by-browser")


def test_keys_lead_through_the_results(page: Page):
    page.goto("/?q=guitar")
    page.keyboard.press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    second = page.locator(".hit h3 a").nth(1)
    expect(second).to_be_focused()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.press("ArrowDown")
    there = page.locator(".hit h3 a").first.get_attribute("href")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(f"{there}$"))


def test_colours_are_switched_and_names_copied_in_place(page: Page):
    page.goto(GUITAR)
    page.get_by_role("button", name="Dark").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 20, 18)"
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.get_by_role("button", name="Copy the name").click()
    expect(page.get_by_text("Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "local/guitar-0008e6a5"


def test_the_atlas_is_drawn_and_leads_to_models(page: Page):
    page.goto("/atlas")
    atlas = page.locator("#atlas")
    expect(atlas).to_have_attribute("data-frame", ANYTHING, timeout=LONG)
    assert int(atlas.get_attribute("data-points") or 0) >= 135
    with Image.open(io.BytesIO(page.locator("#atlas canvas").first.screenshot())) as drawn:
        hues = {pixel for _, pixel in drawn.convert("RGB").getcolors(1 << 20) if max(pixel) - min(pixel) > 60}
    assert len(hues) > 8  # points of many colours, not an empty canvas
    page.get_by_role("searchbox").fill("guitar")
    page.keyboard.press("Enter")
    expect(atlas).to_have_attribute("data-lit", re.compile("[1-9]"), timeout=LONG)
    place = page.evaluate("""async () => { const a = await (await fetch('/api/v1/atlas')).json();
      const i = a.names.indexOf('local/guitar-0008e6a5'); return [a.x[i] / 65535, a.y[i] / 65535]; }""")
    box = page.locator("#atlas canvas").first.bounding_box()
    assert box
    wide, tall = box["width"], box["height"]
    stretch = max(1, min(1.7, wide / tall)) * min(wide, tall)
    x, y = (place[0] - 0.5) * stretch + wide / 2, (place[1] - 0.5) * min(wide, tall) + tall / 2
    page.mouse.move(box["x"] + x, box["y"] + y)
    expect(page.locator(".tip")).to_contain_text("guitar", timeout=LONG)
    page.mouse.down()
    page.mouse.up()
    expect(page).to_have_url(re.compile("/m/local/"))


def test_the_atlas_draws_a_hundred_thousand_points(page: Page):
    # The map that the server would send, with as many points as it is made for.
    page.route("**/api/v1/atlas", lambda route: route.fulfill(json=_large_atlas(100_000)))
    page.route("**/atlas/model?*", lambda route: route.fulfill(body="a model"))
    page.route("**/atlas/faces?*", lambda route: route.fulfill(json={}))
    page.goto("/atlas")
    expect(page.locator("#atlas")).to_have_attribute("data-frame", ANYTHING, timeout=LONG)
    assert page.locator("#atlas").get_attribute("data-points") == "100000"
    box = page.locator("#atlas").bounding_box()
    assert box
    page.mouse.move(box["x"] + 300, box["y"] + 300)
    for _ in range(10):
        page.mouse.wheel(0, -200)
    page.wait_for_timeout(200)
    # What the page itself does in a frame; filling pixels is the graphics card's work.
    assert float(page.locator("#atlas").get_attribute("data-frame") or 0) < 50


def _large_atlas(count: int) -> dict[str, Any]:
    kinds = ["adapter"] * count
    return {
        "side": "weights", "names": [f"m/{i}" for i in range(count)], "x": [(i * 7919) % 65536 for i in range(count)],
        "y": [(i * 104_729) % 65536 for i in range(count)], "by_card": [False] * count, "kind": kinds, "family": kinds,
        "tree": [str(i % 9) for i in range(count)], "regions": [], "stale": False,
    }  # fmt: skip


def test_everything_is_there_without_javascript(browser: Browser, grove: Any, worker: None):
    context = browser.new_context(base_url=grove.url, java_script_enabled=False)
    page = context.new_page()
    page.goto("/")
    page.get_by_role("searchbox").fill("violin")
    page.get_by_role("button", name="Search").click()
    page.locator(".facets a", has_text="cc-by-4.0").click()
    assert "licence=cc-by-4.0" in page.url
    assert "q=violin" in page.url
    page.locator(".hit h3 a").first.click()
    for part in ("Files", "Layers", "Family", "Similar", "Jobs", "Actions", "Overview"):
        page.get_by_role("navigation", name="Model").get_by_role("link", name=part).click()
        expect(page.get_by_role("heading", level=1)).to_be_visible()
    page.get_by_label("Prompt").fill("a picture of sks on the beach")
    page.get_by_role("button", name="Paint").click()
    expect(page.locator(".gallery img")).to_be_visible(timeout=LONG)  # the page asks again by itself
    page.goto("/atlas")
    expect(page.get_by_role("link", name="local/zoo-base", exact=True)).to_be_visible()
    expect(page.locator("#atlas")).to_be_hidden()
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_barrier_and_nothing_wider_than_a_phone(browser: Browser, grove: Any, scheme: str):
    # axe is put in by the driver, past the policy that a page of ours has.
    context = browser.new_context(base_url=grove.url, color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    barriers = {}
    for path in PAGES:
        page.set_viewport_size({"width": 1280, "height": 860})
        page.goto(path)
        page.wait_for_load_state("networkidle") if not path.startswith("/jobs") else None
        page.evaluate(AXE)
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        barriers[path] = [
            (fault["id"], [node["html"][:160] for node in fault["nodes"][:3]])
            for fault in found["violations"]
            if fault["impact"] in ("serious", "critical")
        ]
        page.set_viewport_size({"width": 375, "height": 800})
        wider = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        if wider > 0:
            barriers[path].append(("wider than a phone by", [wider]))
    context.close()
    assert {path: found for path, found in barriers.items() if found} == {}
