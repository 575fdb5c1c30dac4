"""Adapters of other trainers: modules that these blocks have in other programs.

This file decides which modules are parts of one weight, or of two:

===============================================  =================================================
module                                           what it changes
===============================================  =================================================
``in_proj_q``, ``in_proj_k``, ``in_proj_v``      rows of ``in_proj_qkv``, in this order (Tinker)
``in_proj_qkvz``                                 ``in_proj_qkv``, then ``in_proj_z`` (SGLang, vLLM)
``in_proj_ba``                                   ``in_proj_b``, then ``in_proj_a`` (SGLang, vLLM)
``experts.w1``, ``w3``, ``w2``                   ``gate_proj``, ``up_proj``, ``down_proj`` of all
                                                 experts, ``[experts, r, in]`` (Tinker)
``experts.gate_proj``, ``up_proj``,              the same
``down_proj``
``experts.gate_up_proj``                         both, stacked likewise (Megatron-Bridge, SkyRL)
``experts.N.w1``, ``w3``, ``w2``,                those of one expert
``experts.N.gate_up_proj``
===============================================  =================================================

Modules of single experts with the names on the hub follow from the table, and core reads them. Rows
of q, k, v and z are contiguous here; those of Qwen3-Next, which are interleaved, have other names
of blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from qcore.api import AdapterClaim, AdapterPiece

from .table import ROOT, layer_types, parts, text_config

_A = ".lora_A.weight"
_DELTA = ("in_proj_q", "in_proj_k", "in_proj_v", "in_proj_qkvz", "in_proj_ba")
_EXPERTS = {
    "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj", "gate_proj": "gate_proj",
    "up_proj": "up_proj", "down_proj": "down_proj", "gate_up_proj": "gate_up_proj",
}  # fmt: skip
_ON_HUB = ("gate_proj", "up_proj", "down_proj")  # of one expert: core reads them
_MODULE = re.compile(
    r"base_model\.model\.model\.(?:language_model\.)?layers\.(?P<layer>\d+)\.(?:"
    rf"linear_attn\.(?P<delta>{'|'.join(_DELTA)})|"
    rf"mlp\.experts\.(?:(?P<expert>\d+)\.)?(?P<experts>{'|'.join(_EXPERTS)}))"
)


def claims(
    adapter: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], *, moe: bool
) -> Iterator[AdapterClaim]:
    """Yield one claim if the adapter has modules that are parts of a weight.

    Args:
        adapter: shapes by tensor name.
        config: config.json of the base.
        moe: whether the feed-forward layers are mixtures of experts.
    """
    modules = [
        (name.removesuffix(_A), match, shape)
        for name, shape in adapter.items()
        if name.endswith(_A) and (match := _MODULE.fullmatch(name.removesuffix(_A)))
    ]
    if not modules:
        return
    part = next(parts(config, moe=moe))
    kinds = dict(enumerate(layer_types(text_config(config))))
    pieces: list[AdapterPiece] = []
    for module, match, shape in modules:
        kind, layer = kinds.get(int(match["layer"])), f"{ROOT}.layers.{match['layer']}"
        if match["delta"] and kind == "linear_attention":
            pieces += _delta(module, f"{layer}.linear_attn", match["delta"], part.dims)
        elif match["experts"] and moe and kind is not None:
            pieces += _experts(module, f"{layer}.mlp.experts", match, shape, part.dims)
    if pieces:
        yield AdapterClaim(layout="parts of weights", pieces=tuple(pieces))


def _delta(module: str, block: str, name: str, dims: Mapping[str, int]) -> Iterator[AdapterPiece]:
    """Yield the weights of a projection of the gated delta net, and their rows."""
    values = dims["v_heads"] * dims["v_dim"]
    conv, heads = dims["conv"], dims["v_heads"]
    keys = (conv - values) // 2
    if name == "in_proj_qkvz":
        both = (("in_proj_qkv", (0, conv)), ("in_proj_z", (conv, conv + values)))
    elif name == "in_proj_ba":
        both = (("in_proj_b", (0, heads)), ("in_proj_a", (heads, 2 * heads)))
    else:
        rows = {
            "in_proj_q": (0, keys), "in_proj_k": (keys, 2 * keys), "in_proj_v": (2 * keys, conv),
        }  # fmt: skip
        yield AdapterPiece(module=module, weight=f"{block}.in_proj_qkv.weight", rows=rows[name])
        return
    for weight, source in both:
        yield AdapterPiece(module=module, weight=f"{block}.{weight}.weight", source=source)


def _experts(
    module: str, block: str, match: re.Match[str], shape: tuple[int, ...], dims: Mapping[str, int]
) -> Iterator[AdapterPiece]:
    """Yield the stack of experts that a module changes, and its rows."""
    name, expert = match["experts"], match["expert"]
    if len(shape) != (3 if expert is None else 2):
        return  # PEFT's own layout has two dimensions for a whole stack
    if expert is not None and (int(expert) >= dims["experts"] or name in _ON_HUB):
        return
    proj, size = _EXPERTS[name], dims["expert_ffn"]
    rows = {"gate_proj": (0, size), "up_proj": (size, 2 * size)}.get(proj)
    weight = "down_proj" if proj == "down_proj" else "gate_up_proj"
    yield AdapterPiece(
        module=module, weight=f"{block}.{weight}", rows=rows,
        expert=None if expert is None else int(expert),
    )  # fmt: skip
