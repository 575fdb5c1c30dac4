"""Compares the weights of a base with those that the training of an adapter recorded.

This file is for verbs that read the weights layer by layer, so that they never have the digests of
all of them: it reads and hashes the tensors that the adapter's manifest lists, and stops at the
first that differs. A merge compares them as it copies them, `qcore generate` as it loads them.

Code: ``QC-MERGE-001`` another base.
"""

from __future__ import annotations

from ..adapter.peft_names import Adapter
from ..errors import InputError
from ..nn.load import read_ahead
from ..plugins.resolve_model import Identified
from ..reporting import Reporter


def other_base(base: Identified, adapter: Adapter, reporter: Reporter) -> InputError | None:
    """Return the error for a base that an adapter was not trained on; ``None`` if it was.

    Args:
        base: the base; its weights are not quantized.
        adapter: an adapter; one that records no weights is not compared.
        reporter: receives the progress.
    """
    recorded = adapter.meta.get("tensors")
    recorded = recorded if isinstance(recorded, dict) else {}
    located = base.layout.located.values()
    items = [item for item in located if item.tensor.name in recorded and item.places]
    items.sort(key=lambda item: (item.places[0].header.file, item.places[0].header.start))
    with reporter.progress("comparing the base with that of training", len(items), "tensors") as go:
        for slab in read_ahead(base.checkpoint, items):
            if slab.digest is None:
                continue
            go(1)
            name = slab.item.tensor.name
            if slab.digest != recorded[name]:
                return InputError(
                    "QC-MERGE-001",
                    "is not the base that the adapter was trained on",
                    file=base.checkpoint.path,
                    field=name,
                    found=f"sha256 {slab.digest[:12]}",
                    expected=str(recorded[name])[:12],
                    fix=f"name {adapter.meta.get('model', {}).get('source', 'its base')}",
                )
    return None
