"""Puts modules of plugins at their dotted names, and proves that they use every tensor.

This file decides that modules lie in plain containers, so that parameter names are the table's.
`model` decides what is mounted where.
"""

from __future__ import annotations

from torch import nn

from ..checkpoint.layout import Layout
from ..errors import PluginError


def mount(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at a dotted path below `root`, through plain containers."""
    *parents, leaf = path.split(".")
    for name in parents:
        child = root._modules.get(name)
        if child is None:
            child = nn.Module()
            root.add_module(name, child)
        root = child
    root.add_module(leaf, module)


def prove_total(layout: Layout, known: set[str]) -> None:
    """Check that the blocks use every row of the loaded parts.

    Args:
        layout: of the checkpoint.
        known: canonical names that the blocks use.

    Raises:
        PluginError: ``QC-MODEL-002``.
    """
    for entry in layout.table:
        if layout.loads(entry.part) and entry.name not in known:
            raise PluginError(
                "QC-MODEL-002",
                "is a row of the table that the blocks do not use",
                field=entry.name,
                fix="report this to the plugin's author",
            )
