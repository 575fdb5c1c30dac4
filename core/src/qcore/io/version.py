"""The version of the qcore distribution, for modules that must not import `qcore`."""

from __future__ import annotations

from typing import Final

__version__: Final = "0.1.0"
