"""Weights in a format that qcore does not decode, such as NVFP4: which tensors on disk make one up.

This file decides which tensor holds the values of a weight, under which name the bf16 original had
it, and which other tensors belong to it: scales, zero points, group indices. Such a weight is
carried: a merge copies its bytes. `qcore.checkpoint.quantization_formats` recognizes the formats,
`qcore.checkpoint.layout` matches the weights with the parameter table.

    NAME = STEM.weight               the bf16 weight
    NAME, NAME_packed, NAME_blocks   the tensor with the values, or
    STEM.qweight                     the same for GPTQ and AWQ
    NAME_<leaf>, NAME.<leaf>         its scales and the like, or
    STEM.<leaf>                      the same for all but the MXFP4 of a stack
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from .quantization_formats import READABLE, Format, quantized_weights
from .safetensors_header import Header

#: Leaves beside the values, ``STEM.<leaf>``.
_BESIDE = (
    "qzeros", "scales", "g_idx",
    "weight_scale", "weight_scale_2", "weight_scale_inv", "weight_global_scale",
    "weight_zero_point", "weight_shape", "weight_g_idx", "pre_quant_scale",
    "input_scale", "input_global_scale", "input_zero_point", "activation_scale",
    "output_scale", "k_scale", "v_scale", "SCB", "weight_format",
)  # fmt: skip
#: Ends of names, ``NAME_<end>``: a stack of experts has no module of its own.
_ENDS = (
    "scale", "scale_2", "scale_inv", "scales", "zero_point", "global_scale", "shape", "g_idx",
    "weight_scale", "weight_scale_2", "weight_global_scale", "input_scale", "input_global_scale",
)  # fmt: skip
#: Leaves below the name of a bitsandbytes weight, ``NAME.<leaf>``.
_BELOW = (
    "absmax", "quant_map", "nested_absmax", "nested_quant_map",
    "quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4",
)  # fmt: skip
#: Leaves of an attention module whose key-value cache is quantized.
_CACHE = ("q_scale", "k_scale", "v_scale", "prob_scale", "k_zero_point", "v_zero_point")
#: Ends of the name of the values, which the bf16 weight does not have.
_VALUES = ("_packed", "_blocks")


class PackedWeight(NamedTuple):
    """A weight, or a piece of one, that is carried as it is.

    Attributes:
        format: how it is stored.
        header: the tensor with the values.
        companions: the other tensors that belong to it.
    """

    format: Format
    header: Header
    companions: tuple[Header, ...]


def packed_weights(headers: Mapping[str, Header]) -> dict[str, PackedWeight]:
    """Return the carried weights of a checkpoint, by the name of the bf16 weight on disk."""
    found = {}
    for name, kind in quantized_weights(headers):
        if kind not in READABLE:
            weight = plain_name(name)
            others = (headers.get(other) for other in _companions(weight))
            found[weight] = PackedWeight(
                kind, headers[name], tuple(h for h in others if h is not None and h.name != name)
            )
    return found


def cache_scales(headers: Mapping[str, Header]) -> Iterator[str]:
    """Yield the names of scales of a quantized key-value cache, which belong to no weight."""
    for name in headers:
        if name.rpartition(".")[2] in _CACHE:
            yield name


def plain_name(name: str) -> str:
    """Return the name that the bf16 weight has whose values are in the tensor `name`."""
    stem, _, leaf = name.rpartition(".")
    if leaf == "qweight":
        return f"{stem}.weight"
    for end in _VALUES:
        if name.endswith(end):
            return name.removesuffix(end)
    return name


def shape_problem(packed: PackedWeight, shape: tuple[int, ...]) -> str | None:
    """Return the shape that a packed weight should have; ``None`` if it may be right.

    Args:
        packed: the weight on disk.
        shape: ``[..., out, in]`` of the bf16 weight.
    """
    found, bits = packed.header.shape, {"F4": 1}.get(packed.header.dtype, 2)
    if packed.format in (Format.NVFP4, Format.MXFP4) and packed.header.name.endswith("weight"):
        expected = (*shape[:-1], -(-shape[-1] // bits))
        return None if found == expected else str(list(expected))
    if packed.format is Format.GPTQ and len(shape) == 2:
        return None if found[1:] == shape[:1] else f"[..., {shape[0]}]"
    if packed.format is Format.AWQ and len(shape) == 2:
        return None if found[:1] == shape[1:] else f"[{shape[1]}, ...]"
    if packed.format is Format.COMPRESSED and len(shape) == 2:
        return None if found[:1] == shape[:1] else f"[{shape[0]}, ...]"
    if packed.header.dtype.startswith("F8_"):
        return None if found == shape else str(list(shape))
    return None


def _companions(weight: str) -> Iterator[str]:
    """Yield the names that companions of a weight may have."""
    stem, _, leaf = weight.rpartition(".")
    if leaf == "weight":
        yield from (f"{stem}.{other}" for other in _BESIDE)
    yield from (f"{weight}_{end}" for end in _ENDS)
    yield from (f"{weight}.{other}" for other in _BELOW)
