"""Test helpers for authors of plugins: distributions on disk, checkpoints without weights.

This file decides which names are public. They depend on no test runner and import no torch. What
a plugin's own code uses is `qcore.api` and `qcore.ops`; it must not import this package.

==============================================  ===================================================
`write_distribution`                            a distribution as an installer leaves it
`discover_plugins`, `Plugins`                   the plugins of chosen distributions, and no others
`fake_checkpoint`                               a config and a chat template, without files
`write_sparse_checkpoint`, `open_checkpoint`    a model folder of any size that takes no disk space
==============================================  ===================================================
"""

from __future__ import annotations

from ..plugins.manager import Plugins
from .checkpoints import fake_checkpoint, open_checkpoint, write_sparse_checkpoint
from .distributions import discover_plugins, write_distribution

__all__ = [
    "Plugins",
    "discover_plugins",
    "fake_checkpoint",
    "open_checkpoint",
    "write_distribution",
    "write_sparse_checkpoint",
]
