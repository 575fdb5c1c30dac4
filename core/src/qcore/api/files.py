"""Where plugins may write cache files (``~/.cache/qcore``), and errors when writing fails.

This file decides where caches lie (``$XDG_CACHE_HOME/qcore``, else ``~/.cache/qcore``) and that a
plugin's failure to write is the same `WriteError` as core's. Checkpoints and adapters are written
by core alone.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..io.atomic import write_error, writing

__all__ = ["user_cache", "write_error", "writing"]


def user_cache(name: str) -> Path:
    """The folder ``qcore/<name>`` in the user's cache; it need not exist.

    A relative ``XDG_CACHE_HOME`` is ignored, as the specification of base directories says.

    Args:
        name: folder of this cache.

    Raises:
        RuntimeError: there is no home folder, and ``XDG_CACHE_HOME`` names no absolute path.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "qcore" / name
