"""The version of this distribution, readable from every package without importing `qcore`."""

from __future__ import annotations

from typing import Final

__version__: Final = "0.1.0"
