"""The layout of a base whose head gets values of its own, although config.json ties it.

This file decides that such a head has the values of the embedding until something changes them: it
is located where the embedding is, or at its own tensor if the checkpoint has one. The fingerprint
of the base stays that of the tied base, and a merge writes the head and unties config.json
(`qcore.merging.untied_output`).
"""

from __future__ import annotations

from dataclasses import replace

from ..api.parameters import Part, Table
from .layout import Layout


def untied(layout: Layout) -> Layout:
    """Return the layout with a head of its own; a layout without a tied head stays as it is.

    Args:
        layout: the layout of the base.
    """
    tied = [tensor for tensor in layout.table if tensor.row.group == "head" and tensor.row.tie]
    if not tied:
        return layout
    table = Table([_untied_part(part) for part in layout.table.parts])
    located = {
        name: replace(item, tensor=table[name], tied=None if _is_head(table, name) else item.tied)
        for name, item in layout.located.items()
    }
    by_disk = {disk: (table[t.name], region) for disk, (t, region) in layout.by_disk.items()}
    for head in tied:
        assert head.row.tie is not None
        if not located[head.name].places:
            own = layout.located[head.row.tie]
            located[head.name] = replace(own, tensor=table[head.name], tied=None)
        disk = layout.namespaces[head.part.name].spell(head.name)
        by_disk.setdefault(disk, (table[head.name], tuple(slice(0, n) for n in head.shape)))
    return replace(
        layout,
        table=table,
        located=located,
        by_disk=by_disk,
        ties={name: tie for name, tie in layout.ties.items() if not _is_head(table, name)},
        untied=frozenset(head.name for head in tied),
    )


def _is_head(table: Table, name: str) -> bool:
    return table[name].row.group == "head"


def _untied_part(part: Part) -> Part:
    """Return a part whose head is not tied."""
    rows = tuple(replace(r, tie=None) if r.group == "head" else r for r in part.rows)
    return part if rows == part.rows else replace(part, rows=rows)
