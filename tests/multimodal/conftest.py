"""A reader of the real processor files, with a cache of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.media_kit import checkpoint

pytest.importorskip("transformers")


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that holds the reader's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("QCORE_MEDIA_CACHE_GB", raising=False)
    return tmp_path / "cache" / "qcore" / "media"


@pytest.fixture
def new_reader(cache_home: Path, shared: Path) -> Callable[[], Any]:
    """Makes readers of one cache."""

    def make() -> Any:
        from qcore_multimodal.reader import Reader

        return Reader(checkpoint(shared / "skus" / "processor"))

    return make


@pytest.fixture
def reader(new_reader: Callable[[], Any]) -> Any:
    """A reader whose cache is empty."""
    return new_reader()
