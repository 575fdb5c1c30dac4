"""Which rows of a tensor a rank holds where the base is sharded.

This file decides the split, that of FSDP (``torch.chunk`` along dim 0), and who hashes what: a
stack of experts is hashed slice by slice by the rank that reads the slice; any other tensor that is
split is hashed by one rank, which reads all of it. It imports no torch.

Dim 0 is the rows (out features) of a linear map, and the experts of a stack. A shard of a 4-bit
weight is whole blocks of 64 values, because a row is.
"""

from __future__ import annotations

from collections.abc import Iterable


def rows_of(count: int, rank: int, size: int) -> slice:
    """The rows of `count` that a rank of `size` holds; the last ranks may hold fewer, or none."""
    each = -(-count // size)
    return slice(min(rank * each, count), min((rank + 1) * each, count))


def appointed(tensors: Iterable[tuple[str, int]], size: int) -> dict[str, int]:
    """The rank that reads each tensor whole, so that all ranks read about as many bytes.

    Args:
        tensors: names and bytes, in the order of reading.
        size: number of ranks.
    """
    read = [0] * size
    chosen: dict[str, int] = {}
    for name, nbytes in tensors:
        rank = min(range(size), key=lambda one: (read[one], one))
        read[rank] += nbytes
        chosen[name] = rank
    return chosen
