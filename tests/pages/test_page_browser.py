"""The page of samples in headless Chromium; run by ``make test-pages``, which installs it."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.page_kit import write_page

if os.environ.get("QCORE_PAGES") != "1":
    pytest.skip("needs a browser; run `make test-pages`", allow_module_level=True)

from playwright.sync_api import expect, sync_playwright

from qcore.api import Payload
from qcore.data.views.page import THUMBNAIL
from qcore_multimodal.preview import preview

SLOW = 120_000  # ms, for a machine that does other things


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as play:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("pages")
    stream = io.BytesIO()
    Image.new("RGB", (400, 300), (30, 90, 200)).save(stream, "PNG")
    payload = Payload(kind="image", sha256="", data=stream.getvalue(), options={})
    for count in (1, 100, 10_000):
        write_page(folder / f"{count}.html", count, preview(payload, THUMBNAIL))
    return folder


def open_page(browser: Any, path: Path, logs: list[str], scheme: str = "light") -> Any:
    context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(SLOW)
    page.on("console", lambda message: logs.append(message.text))
    page.on("pageerror", lambda error: logs.append(str(error)))
    page.on("request", lambda request: logs.append(request.url[:60]))
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready=yes]")
    return page


@pytest.mark.parametrize("count", [1, 100, 10_000])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_opens_without_requests_or_errors(
    browser: Any, pages: Path, count: int, scheme: str
) -> None:
    logs: list[str] = []
    page = open_page(browser, pages / f"{count}.html", logs, scheme)
    others = [line for line in logs if not line.startswith(("file:", "data:image/jpeg"))]
    assert others == []
    assert page.inner_text("#count") == f"{count:,} of {count:,}"
    assert 1 <= page.locator(".item").count() <= 40
    shots = os.environ.get("QCORE_PAGES_SHOTS")
    if shots:
        page.screenshot(path=f"{shots}/{count}-{scheme}.png")
    page.context.close()


def test_text_of_rows_does_not_act(browser: Any, pages: Path) -> None:
    logs: list[str] = []
    page = open_page(browser, pages / "100.html", logs)
    page.fill("#search", "window.pwned")
    expect(page.locator("#count")).to_have_text("7 of 100", timeout=SLOW)
    text = page.inner_text("#text")
    assert "</script><script>window.pwned=1</script>" in text
    assert "\\u001b" in text
    assert "\u202e" not in text
    assert page.evaluate("window.pwned") is None
    assert page.locator("#text img").count() == 0
    page.context.close()


def test_keys_search_and_filters(browser: Any, pages: Path) -> None:
    page = open_page(browser, pages / "10000.html", [])
    page.keyboard.press("j")
    assert page.inner_text("#head").startswith("Row 2, sample 1")
    assert "QC-DATA-043" in page.inner_text("#notes")
    page.keyboard.press("]")
    assert page.inner_text("#why").startswith("Trained: answer")
    page.hover("#text > span >> nth=0")
    assert page.inner_text("#why").startswith("Not trained: user turn")
    page.keyboard.press("End")
    assert page.inner_text("#head").startswith("Row 10000, left out")
    page.keyboard.press("/")
    page.keyboard.type("question 9876?")
    expect(page.locator("#count")).to_have_text("1 of 10,000", timeout=SLOW)
    assert page.inner_text("#head").startswith("Row 9876, sample 1")
    page.keyboard.press("Escape")
    page.fill("#search", "")
    page.select_option("#finding", "QC-DATA-006")
    expect(page.locator("#count")).to_have_text("200 of 10,000", timeout=SLOW)
    page.select_option("#finding", "")
    page.select_option("#format", label="openai")
    page.fill("#low", "90")
    expect(page.locator("#count")).not_to_have_text("200 of 10,000", timeout=SLOW)
    page.wait_for_timeout(500)
    shares = page.locator(".item .share").all_inner_texts()
    assert all(int(share.split()[-2]) >= 90 for share in shares)
    page.context.close()


def test_an_image_has_a_thumbnail(browser: Any, pages: Path) -> None:
    page = open_page(browser, pages / "1.html", [])
    assert page.evaluate("document.querySelector('#media img').naturalWidth") == 160
    page.context.close()
