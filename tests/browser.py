"""A real headless browser for the pages that the project makes: Chromium and its driver, from the distribution."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

PACKAGES = "chromium chromium-driver"
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason=f"no browser: apt-get install {PACKAGES}"
)
# It opens local files alone: nothing it does in the background may look for a network.
OPTIONS = """
    --headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update
    --disable-sync --window-size=1400,1000
"""


@contextmanager
def opened(address: str) -> Iterator[Any]:
    """A page in a browser of its own, with the console kept (``get_log("browser")``)."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = CHROMIUM
    for option in OPTIONS.split():
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    browser.set_script_timeout(60)
    try:
        browser.get(address)
        yield browser
    finally:
        browser.quit()


def errors(browser: Any) -> list[str]:
    """What the console calls an error, so far."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
