"""Fixtures that every area shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real configs, templates, tokenizer and key lists; skips where absent."""
    named = os.environ.get("QCORE_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "skus").is_dir():
        pytest.skip("reference files are not beside the checkout (set QCORE_SHARED)")
    return folder
