"""Fingerprint of a base: one SHA-256 per part (text, tower), recorded by the adapters of the base.

A fingerprint binds an adapter to its base. This file decides what it covers: (canonical name,
dtype, shape, SHA-256 of the bytes) of every tensor of the part, sorted by name. It does not
depend on sharding, on name prefixes or on whether experts are fused, nor on any other part, so a
re-save that drops another part does not change it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from .layout import Layout


def fingerprints(layout: Layout, digests: Mapping[str, str]) -> dict[str, str]:
    """Compute the fingerprint of every part whose tensors all have a digest.

    Args:
        layout: layout of the checkpoint.
        digests: canonical tensor name -> SHA-256 of its bytes, in hex.

    Returns:
        Part name -> SHA-256 in hex. Tied tensors are not covered.
    """
    lines: dict[str, list[str]] = {}
    partial: set[str] = set()
    for item in layout.located.values():
        tensor = item.tensor
        if item.tied is not None or tensor.name in (*layout.ties, *layout.untied):
            continue
        if tensor.name not in digests:
            partial.add(tensor.part.name)
            continue
        shape = "x".join(map(str, item.stored.shape))
        lines.setdefault(tensor.part.name, []).append(
            f"{tensor.name} {item.dtype} {shape} {digests[tensor.name]}"
        )
    return {
        part: hashlib.sha256("\n".join(sorted(entries)).encode()).hexdigest()
        for part, entries in lines.items()
        if part not in partial
    }
