"""Proves that a merge computes what base + adapter computes (`prove_merge`).

This file decides what is compared, on random tokens through the plugin's own blocks, in float32
with one layer in memory at a time. From the same input, each layer with the merged weights, not
rounded, must compute what it computes with the adapter as training applies it. (Compared after
many layers, float32 would drift apart, and a router would pick other experts.) Two more streams
run to the logits: the merged model on its own outputs, whose difference is reported, and the base,
which shows the effect of the adapter. Where the adapter changes a tower, the layers of the
tower run first by the same rule, on synthetic media, and their outputs replace some tokens;
otherwise no tensor of the tower is read. Weights that qcore does not decode, which a merge copies,
have stand-ins in all streams (`disk_rows`). The written files must hold the merged weights, rounded
once; the effect of that rounding on logits is expected and not checked.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..adapter.delta import Deltas, one_thread
from ..adapter.peft_names import Adapter
from ..errors import NumericError
from ..plugins.resolve_model import Identified
from .streams import Streams


def prove_merge(
    base: Identified,
    adapter: Adapter,
    deltas: Deltas,
    written: Path,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Compare the unrounded merge with base + adapter on random tokens, and with the files.

    Args:
        base: the base.
        adapter: the adapter.
        deltas: its matrices, as the merge added them.
        written: the folder that holds the merged files.
        progress: called with the bytes read.

    Returns:
        ``layers``: the largest difference of a layer's output, as a share of what is allowed;
        ``difference`` and ``effect``: largest absolute differences of logits between the merge,
        or the base, and base + adapter; ``scale``: the largest absolute logit; ``rerouted``:
        tokens that picked other experts in a layer of the merge, by rounding; ``tower_effect``:
        as ``effect``, of a tower's outputs, where the adapter changes one; ``stand_ins``: weights
        that random values stood in for, where there are any.

    Raises:
        NumericError: ``QC-MERGE-005`` when a layer differs, or when the adapter has no effect;
            ``-007`` when a file holds another sum than the verified one, ``-004`` when a
            pair is in no layer.
    """
    streams = Streams(base, adapter, deltas, written, progress or (lambda count: None))
    # On one core, beside the thread that reads: see `one_thread`.
    with torch.no_grad(), one_thread():
        result = streams.compare(*streams.run())
    if not max(result["effect"], result.get("tower_effect", 0.0)) > 0:
        raise NumericError(
            "QC-MERGE-005",
            "has no effect on the base's logits",
            file=adapter.path,
            found="0",
            expected="a difference",
            fix="train longer",
        )
    return result
