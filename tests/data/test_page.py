"""The page of samples: safe against the text of rows, self-contained, never over another file."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.chat_kit import own_tokenizer
from support.page_kit import HOSTILE, write_page

from qcore.data.views.page import THUMBNAILS, Page, check_page, embedded
from qcore.errors import UsageError


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_text_of_rows_is_data_alone(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_page(path, 60)
    parser = _Tags()
    parser.feed(path.read_text(encoding="utf-8"))
    assert [tag for tag, _ in parser.tags].count("script") == 2
    assert not [tag for tag, _ in parser.tags if tag in ("img", "link", "iframe", "object")]
    assert not [attrs for _, attrs in parser.tags if "src" in attrs or "href" in attrs]
    (text,) = [one for one in parser.texts if one.lstrip().startswith('{"samples"')]
    data = json.loads(text)
    assert data["meta"]["model"] == HOSTILE
    assert data["samples"][16][7][2][0] == HOSTILE
    assert data["findings"][0]["message"] == HOSTILE


def test_the_policy_allows_the_own_script_and_style_alone(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_page(path, 1)
    html = path.read_text(encoding="utf-8")
    (policy,) = re.findall(r'Security-Policy" content="([^"]*)"', html)
    assert policy.startswith("default-src 'none'; img-src data:; ")
    for tag in ("style", "script"):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(", html)


@pytest.mark.parametrize("text", ["<", "</script>", "&lt;", "\u2028\u2029", "\ud800", "]]>"])
def test_embedded_json_has_no_markup_and_reads_back(text: str) -> None:
    made = embedded({text: [text]})
    assert not set(made) & set("<>&\u2028\u2029\ud800")
    assert json.loads(made) == {text: [text]}


def test_another_file_is_not_overwritten_and_an_own_page_is(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": []}\n')
    with pytest.raises(UsageError, match="is not a page"):
        check_page(path)
    page = tmp_path / "page.html"
    check_page(page)
    write_page(page, 1)
    check_page(page)
    write_page(page, 2)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["page.html", "rows.jsonl"]


def test_thumbnails_of_ten_thousand_media_are_small_and_bounded(tmp_path: Path) -> None:
    """The later ones are smaller, so that all of them fit."""
    page = Page(own_tokenizer())
    sizes = []
    for n in range(10_000):
        sizes.append(page.thumbnail)
        # What a JPEG of a photo takes: a head, and bytes that grow with the pixels.
        url = f"data:image/jpeg;base64,{n:08d}" + "A" * (800 + page.thumbnail**2 // 5)
        assert page._thumbnail(url) == n
    assert sizes[0] == 160
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] >= 40
    assert page._size < THUMBNAILS
