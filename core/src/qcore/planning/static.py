"""Bytes that a run always has allocated, by term: weights, adapters, gradients, optimizer moments.

This file decides the terms and which tensor belongs to which. `qcore.planning.step` adds what a
step allocates, `qcore.planning.sharding` subtracts what other ranks hold.
"""

from __future__ import annotations

from ..plugins.resolve_model import Identified
from .measure import Measure
from .trace import rounded

TOWER = "tower"  #: memory term of a tower's weights
#: cuBLAS workspaces of the forward and the backward thread, 32 MiB each on Hopper, and the
#: workspace of cuDNN's attention.
LIBRARIES = 2 * 32 * 2**20 + 2**20


def static_terms(
    measure: Measure, identified: Identified, device: str
) -> tuple[dict[str, int], int]:
    """Return the bytes that are always allocated, by term, and the number of trained parameters.

    LoRA terms include those of a tower.

    Args:
        measure: the model on the meta device.
        identified: the model; its headers are enough.
        device: ``cuda`` or ``cpu``, the device that meta stands for.
    """
    model = measure.model
    entries = {entry.name: entry for entry in identified.layout.table}
    names = ["weights nf4", "weights 16 bit", "weights fp32", "embeddings", "adapters"]
    names += [TOWER] if measure.tower is not None else []
    terms = dict.fromkeys(names, 0)
    tower_part = identified.modality.name if identified.modality is not None else None
    for name, layer in model.lora_layers.items():
        if layer.four_bit:
            part = entries[name].part.name
            terms[TOWER if part == tower_part else "weights nf4"] += layer.stored_bytes
    trained = 0
    for name, parameter in model.named_parameters():
        size = rounded(parameter.numel() * parameter.element_size())
        if parameter.requires_grad:
            terms["adapters"] += size
            trained += parameter.numel()
        elif name in entries and entries[name].part.name == tower_part:
            terms[TOWER] += size
        elif name in entries and entries[name].row.group in ("embed", "head"):
            terms["embeddings"] += size
        else:
            wide = parameter.element_size() == 4
            terms["weights fp32" if wide else "weights 16 bit"] += size
    gradients = terms["adapters"]
    # Rounding and the scales of scales belong to the 4-bit weights.
    terms["weights nf4"] += measure.state_bytes - sum(terms.values()) - 3 * gradients
    return terms | {
        "adapters in the run's dtype": measure.working,
        "gradients": gradients,
        "optimizer": 2 * terms["adapters"],
        "libraries": LIBRARIES if device == "cuda" else 0,
    }, trained
