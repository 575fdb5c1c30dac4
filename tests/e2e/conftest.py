"""What several tests of whole runs start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.conversations import conversations, write_rows


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Multi-turn, thinking, tool calls (arguments as mapping and as string), system turns."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", conversations(24))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums are added in one order, whatever ran before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
