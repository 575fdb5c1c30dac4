"""Weights that bitsandbytes stored in 4 bits: which tensors make up one, and what its state says.

This file decides what a usable 4-bit weight is: packed values, scales, and a state in JSON whose
sizes agree. `qcore.nn.four_bit` decodes it, bit for bit as bitsandbytes does.

    NAME                                    U8 [ceil(n / 2), 1], two values a byte
    NAME.absmax                             a scale for each block: F32, or U8 codes
    NAME.quant_map                          F32 [16], the value of each code
    NAME.nested_absmax, .nested_quant_map   with double quantization: scales of the scales
    NAME.quant_state.bitsandbytes__<type>   U8, JSON: type, block size, dtype and shape

Codes: ``QC-KEY-008`` tensors of a 4-bit weight that do not agree.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..errors import InputError
from ..io.atomic import reading
from .checkpoint import Checkpoint, text_sections
from .safetensors_header import Header

TYPES: Final = ("nf4", "fp4")
_STATE: Final = ".quant_state.bitsandbytes__"
_DTYPES: Final = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_STATE_BYTES: Final = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBit:
    """One weight in 4 bits.

    Attributes:
        packed: the tensor with the values.
        absmax: scales of the blocks, or their codes.
        quant_map: the value of each code.
        nested_absmax: with double quantization, scales of the scales.
        nested_quant_map: with double quantization, the value of each code of a scale.
        state: the tensor with the JSON.
        quant_type: ``nf4`` or ``fp4``.
        blocksize: values that share a scale.
        nested_blocksize: scales that share a scale of their own.
        nested_offset: mean of the scales.
        dtype: safetensors name of the dtype of the values before quantization.
        shape: of the weight; ``()`` if only headers were downloaded, and the state is assumed.
    """

    packed: Header
    absmax: Header
    quant_map: Header
    nested_absmax: Header | None
    nested_quant_map: Header | None
    state: Header
    quant_type: str
    blocksize: int
    nested_blocksize: int
    nested_offset: float
    dtype: str
    shape: tuple[int, ...]

    @property
    def companions(self) -> tuple[Header, ...]:
        """The tensors beside the values."""
        nested = (self.nested_absmax, self.nested_quant_map)
        return (self.absmax, self.quant_map, self.state, *(h for h in nested if h is not None))

    @property
    def is_nf4_storage(self) -> bool:
        """Whether `qcore.nn.qlora.nf4` holds such weights: NF4, double quantization, its blocks."""
        return (
            self.quant_type == "nf4"
            and (self.blocksize, self.nested_blocksize) == (64, 256)
            and self.nested_absmax is not None
        )


def has_state(name: str, headers: Mapping[str, Header]) -> bool:
    """Return whether a tensor of 4-bit values has a state, without which it cannot be decoded."""
    return any(f"{name}{_STATE}{kind}" in headers for kind in TYPES)


def four_bit_weights(checkpoint: Checkpoint) -> tuple[dict[str, FourBit], list[InputError]]:
    """Return the 4-bit weights of a checkpoint by name on disk, and what is wrong with others.

    Args:
        checkpoint: its headers, and the states, which are small, are read.
    """
    found: dict[str, FourBit] = {}
    problems = []
    for state in [header for name, header in checkpoint.headers.items() if _STATE in name]:
        name, _, kind = state.name.partition(_STATE)
        try:
            found[name] = _four_bit(checkpoint, name, kind, state)
        except _Disagree as problem:
            problems.append(_error(checkpoint, state, *problem.args))
    return found, problems


class _Disagree(ValueError):
    """(found, expected)."""


def _four_bit(checkpoint: Checkpoint, name: str, kind: str, state: Header) -> FourBit:
    headers = checkpoint.headers
    values = _assumed(checkpoint) if checkpoint.headers_only else _state(checkpoint, state)
    lacking = [n for n in (name, f"{name}.absmax", f"{name}.quant_map") if n not in headers]
    if lacking:
        raise _Disagree("none", lacking[0])
    absmax = headers[f"{name}.absmax"]
    nested = absmax.dtype == "U8"
    if nested and not {f"{name}.nested_absmax", f"{name}.nested_quant_map"} <= headers.keys():
        raise _Disagree("none", f"{name}.nested_absmax and .nested_quant_map")
    weight = FourBit(
        packed=headers[name],
        absmax=absmax,
        quant_map=headers[f"{name}.quant_map"],
        nested_absmax=headers[f"{name}.nested_absmax"] if nested else None,
        nested_quant_map=headers[f"{name}.nested_quant_map"] if nested else None,
        state=state,
        quant_type=kind,
        blocksize=_size(values, "blocksize"),
        nested_blocksize=_size(values, "nested_blocksize") if nested else 0,
        nested_offset=_offset(values) if nested else 0.0,
        dtype=_DTYPES.get(str(values.get("dtype")), ""),
        shape=_shape(values) if "shape" in values else (),
    )
    _check(weight, kind, values)
    return weight


def _state(checkpoint: Checkpoint, header: Header) -> Mapping[str, Any]:
    """Return the JSON in a state."""
    if header.end - header.start > _STATE_BYTES:
        raise _Disagree(f"{header.end - header.start} bytes", "a state in JSON")
    path = checkpoint.file(header.file)
    with reading(path), path.open("rb") as file:
        file.seek(header.start)
        data = file.read(header.end - header.start)
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise _Disagree(repr(data[:40]), "a state in JSON") from None
    if not isinstance(values, dict) or "shape" not in values:
        raise _Disagree(repr(data[:40]), "a state with the shape of the weight")
    return values


def _assumed(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return the state that bitsandbytes writes by default, for headers alone."""
    sections = text_sections(checkpoint.config)
    dtypes = (section.get("dtype", section.get("torch_dtype")) for section in sections)
    dtype = next((str(dtype) for dtype in dtypes if dtype in _DTYPES), "bfloat16")
    return {"blocksize": 64, "nested_blocksize": 256, "nested_offset": 0.0, "dtype": dtype}


def _size(values: Mapping[str, Any], key: str) -> int:
    size = values.get(key)
    if type(size) is not int or size < 1:
        raise _Disagree(f"{key} {size!r}", "a positive integer")
    return size


def _offset(values: Mapping[str, Any]) -> float:
    offset = values.get("nested_offset")
    if not isinstance(offset, int | float) or not math.isfinite(offset):
        raise _Disagree(f"nested_offset {offset!r}", "a finite number")
    return float(offset)


def _shape(values: Mapping[str, Any]) -> tuple[int, ...]:
    shape = values["shape"]
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        raise _Disagree(f"shape {shape!r}", "a list of positive integers")
    return tuple(shape)


def _check(weight: FourBit, kind: str, values: Mapping[str, Any]) -> None:
    """Compare the sizes of the tensors with the state."""
    if kind not in TYPES or values.get("quant_type", kind) != kind:
        raise _Disagree(f"quant_type {values.get('quant_type')!r}", " or ".join(TYPES))
    if not weight.dtype:
        raise _Disagree(f"dtype {values.get('dtype')!r}", " or ".join(_DTYPES))
    if not weight.shape:
        return  # assumed
    count = math.prod(weight.shape)
    blocks = -(-count // weight.blocksize)
    sizes = [
        (weight.packed, "U8", -(-count // 2)),
        (weight.absmax, "U8" if weight.nested_absmax is not None else "F32", blocks),
        (weight.quant_map, "F32", 16),
    ]
    if weight.nested_absmax is not None and weight.nested_quant_map is not None:
        sizes += [
            (weight.nested_absmax, "F32", -(-blocks // weight.nested_blocksize)),
            (weight.nested_quant_map, "F32", 256),
        ]
    for header, dtype, expected in sizes:
        if (header.dtype, header.numel) != (dtype, expected):
            raise _Disagree(
                f"{header.name}: {header.numel} x {header.dtype}", f"{expected} x {dtype}"
            )


def _error(checkpoint: Checkpoint, state: Header, found: str, expected: str) -> InputError:
    return InputError(
        "QC-KEY-008",
        "does not agree with the other tensors of its 4-bit weight",
        file=checkpoint.path / state.file,
        field=state.name,
        found=found,
        expected=expected,
        fix="download the checkpoint again",
    )
