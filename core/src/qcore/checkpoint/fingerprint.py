"""What binds an adapter to its base: one SHA-256 per part, over canonical names.

This file decides what is in it: (canonical name, dtype, shape, SHA-256 of the bytes) of every
tensor of the part, sorted by name. Sharding, prefixes and fused or per-expert files do not
change it, and a re-save that drops another part does not either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from .layout import Layout


def fingerprints(layout: Layout, digests: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 by part, for the parts of which every tensor has a digest.

    Args:
        layout: the checkpoint explained.
        digests: SHA-256 of each canonical tensor's bytes, by name.
    """
    lines: dict[str, list[str]] = {}
    partial: set[str] = set()
    for item in layout.located.values():
        tensor = item.tensor
        if item.tied is not None or tensor.name in layout.ties:
            continue
        if tensor.name not in digests:
            partial.add(tensor.part.name)
            continue
        shape = "x".join(map(str, tensor.shape))
        lines.setdefault(tensor.part.name, []).append(
            f"{tensor.name} {item.dtype} {shape} {digests[tensor.name]}"
        )
    return {
        part: hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()
        for part, found in lines.items()
        if part not in partial
    }
