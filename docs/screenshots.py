"""Takes the pictures of the web page that the documentation shows: `python docs/screenshots.py URL`.

URL is of a hub that holds the zoo's sample with an expert fitted, as `modelgrove demo` leaves it. It needs Debian's
chromium.
"""

from __future__ import annotations

import sys
from pathlib import Path
from urllib.parse import quote

from playwright.sync_api import sync_playwright

FOLDER = Path(__file__).parent / "images"
CHROMIUM = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
PAGES = {
    "web-search": f"/?q={quote('a string instrument played with a bow')}&by=weights",
    "web-model": "/m/local/untitled-d52d91dc",
    "web-atlas": "/atlas",
}


def main(url: str) -> None:
    """Write every picture anew."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=CHROMIUM)
        page = browser.new_page(viewport={"width": 1200, "height": 760})
        for name, path in PAGES.items():
            page.goto(url + path, wait_until="networkidle")
            page.wait_for_timeout(1500)  # the map is drawn after its points have come
            page.screenshot(path=FOLDER / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"))
