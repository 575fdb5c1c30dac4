"""A reader of the real processor files, with a cache of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.bad_media_kit import PNG
from support.media_kit import checkpoint

pytest.importorskip("transformers")


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that holds the reader's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("QCORE_MEDIA_CACHE_GB", raising=False)
    return tmp_path / "cache" / "qcore" / "media"


@pytest.fixture
def new_reader(cache_home: Path, shared: Path) -> Callable[..., Any]:
    """Makes readers of one cache; `report` receives their messages."""

    def make(report: Callable[[str], None] = lambda line: None) -> Any:
        from qcore_multimodal.reader import Reader

        return Reader(checkpoint(shared / "skus" / "processor"), report)

    return make


@pytest.fixture
def reader(new_reader: Callable[[], Any]) -> Any:
    """A reader whose cache is empty."""
    return new_reader()


@pytest.fixture(scope="session")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a tower."""
    from qcore_multimodal.tiny import add_tower
    from qcore_qwen35.tiny import write

    folder = tmp_path_factory.mktemp("seeing") / "base"
    write(folder)
    add_tower(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a data file, with one good picture; the cache lies elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "good.png").write_bytes(PNG)
    return folder


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a tensor is a failure of the test."""

    def read(*arguments: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("qcore.nn.load.read_tensor", read)
