"""The layout of a base with more rows in its embedding and head, for an adapter of added tokens.

This file decides that the added rows are zero until something replaces them, and that all else is
the base's: the fingerprint covers the rows on disk. A merge writes the larger tensors
(`qcore.merging.grown_output`). The weights must be stored as they are, in 16 or 32 bits.

Code: ``QC-KEY-009`` rows cannot be added to a quantized embedding or head.
"""

from __future__ import annotations

from dataclasses import replace

from ..api.parameters import Part, Row, Table
from ..errors import InputError
from .layout import Layout, Located
from .layout_records import Place


def rows_of_vocabulary(layout: Layout) -> int:
    """Return the number of rows of the embedding."""
    return next(tensor.shape[0] for tensor in layout.table if tensor.row.group == "embed")


def grown(layout: Layout, rows: int) -> Layout:
    """Return the layout of a run whose embedding and head have `rows` rows.

    Args:
        layout: the layout of the base.
        rows: at least as many as the base has; a layout with as many stays as it is.

    Raises:
        InputError: ``QC-KEY-009``.
    """
    before = rows_of_vocabulary(layout)
    if rows <= before:
        return layout
    table = Table([_grown_part(part, before, rows) for part in layout.table.parts])
    located = {}
    for name, item in layout.located.items():
        own = table[name]
        if own.shape == item.tensor.shape:
            located[name] = replace(item, tensor=own)
            continue
        for place in item.places:
            _check_plain(place, item)
        located[name] = replace(item, tensor=own, smaller=item.stored)
    by_disk = {disk: (table[t.name], region) for disk, (t, region) in layout.by_disk.items()}
    return replace(layout, table=table, located=located, by_disk=by_disk)


def _grown_part(part: Part, before: int, rows: int) -> Part:
    """Return a part whose embedding and head have `rows` rows."""
    return replace(part, rows=tuple(_grown_row(part, row, before, rows) for row in part.rows))


def _grown_row(part: Part, row: Row, before: int, rows: int) -> Row:
    first, *rest = row.dims.split()
    vocabulary = row.group in ("embed", "head") and part.dims.get(first) == before
    return replace(row, dims=" ".join((str(rows), *rest))) if vocabulary else row


def _check_plain(place: Place, item: Located) -> None:
    """Raise ``QC-KEY-009`` if a tensor on disk is quantized."""
    if place.packed is None and place.four_bit is None and place.scale is None:
        return
    raise InputError(
        "QC-KEY-009",
        "is quantized, so that no rows can be added to it",
        file=place.header.file,
        field=item.tensor.name,
        found=place.packed or place.header.dtype,
        expected="BF16, F16 or F32",
        fix="name the checkpoint in 16 bits that it was made from",
    )
