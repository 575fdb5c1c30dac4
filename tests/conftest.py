"""Fixtures that every area shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.conversations import conversations, write_rows
from support.hub_server import HubServer

if not list(Path("/dev").glob("nvidia[0-9]*")):
    # Without a card Triton's kernels run in its interpreter. Triton reads this at its first
    # import, which any test may cause (bitsandbytes imports it), so it is set before them all.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m gpu``, import only files that hold the mark.

    The others take a minute to import, and need packages that a GPU machine may not have.
    """
    if config.option.markexpr != "gpu" or not collection_path.match("test_*.py"):
        return None
    return True if "pytest.mark.gpu" not in collection_path.read_text("utf-8") else None


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real configs, templates, tokenizer and key lists; skips where absent."""
    named = os.environ.get("QCORE_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "skus").is_dir():
        pytest.skip("reference files are not beside the checkout (set QCORE_SHARED)")
    return folder


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A small model hub on loopback; run the client in a subprocess with ``hub.env(home)``."""
    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Multi-turn, thinking, tool calls (arguments as mapping and as string), system turns."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", conversations(24))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums are added in one order, whatever ran before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
