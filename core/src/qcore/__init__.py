"""qcore: fine-tune and merge language models through plugins.

Public modules: `api`, `errors`, `ops`, and the marker `hookimpl`. Everything else is internal and
may change in a minor version. Importing qcore imports no torch and no plugin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api.hookspecs import hookimpl

__all__ = ["__version__", "hookimpl"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import `hookimpl` on first use, so that ``qcore --help`` does not pay for it."""
    if name == "hookimpl":
        from .api.hookspecs import hookimpl

        return hookimpl
    raise AttributeError(f"module 'qcore' has no attribute '{name}'")
