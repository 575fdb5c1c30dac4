"""Detects how a checkpoint is quantized (FP8, NVFP4, GPTQ, AWQ, ...) and what can be decoded.

This file decides how to recognize a format (by names, dtypes and shapes of tensors) and which
formats can be decoded: FP8 with block scales, and the 4-bit formats of bitsandbytes. A checkpoint
in any other format is refused with an error that names the format and what to use instead, except
by a merge that changes none of its quantized weights (`qcore.checkpoint.packed`). config.json and
hf_quant_config.json also declare a format. The tensors take precedence, but a declaration that
contradicts them is an error, because other tools may rely on it. No tensor is read, except states
of 4-bit weights. `qcore.nn.fp8` and `qcore.nn.four_bit` decode; `qcore.checkpoint.layout` and
`qcore.checkpoint.four_bit` check that scales match.

    block FP8            F8_E4M3 NAME, and NAME_scale_inv with one scale per block
    per-tensor FP8       F8_* NAME, and NAME_scale or a NAME_scale_inv that is not a grid
    NVFP4                U8 NAME, F8_E4M3 NAME_scale, NAME_scale_2
    GPTQ                 I32 qweight [in / n, out], scales [groups, out], usually g_idx
    AWQ                  I32 qweight [in, out / n], scales [groups, out], no g_idx
    bitsandbytes 4-bit   U8 NAME, NAME.absmax, NAME.quant_map, NAME.quant_state.*
    bitsandbytes         the same without a state; or I8 NAME and SCB
    compressed-tensors   NAME_packed; or I8 NAME and NAME_scale
    MXFP4                U8 NAME and U8 or F8_E8M0 NAME_scale; or NAME_blocks and NAME_scales
    packed integers      U8 NAME and NAME_scale in floats

Codes: ``QC-CKPT-008`` an unsupported format, ``-010`` a declaration that contradicts the tensors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ..errors import InputError
from .block_scales import SECTION, BadBlockError, block_size, quantization_sections, scale_name
from .checkpoint import Checkpoint, Header, read_json
from .four_bit import FourBit, four_bit_weights, has_state

_MODELOPT_CONFIG = "hf_quant_config.json"
#: Files that some tools write next to config.json and that only describe quantized weights.
SIDECARS = (
    _MODELOPT_CONFIG,
    "quant_config.json",
    "quantization_config.json",
    "quantize_config.json",
)

_PLAIN = ("BF16", "F32", "F16", "F64")
_NOT_WEIGHTS = ("BOOL", "I64", "U64")
_CARD_BYTES = 2**16
_CARD_BASE = re.compile(r"^base_model:\s*(?:\n\s*)?(?:-\s*)?[\"']?([\w.-]+/[\w.-]+)", re.MULTILINE)


class Format(str, Enum):
    """How quantized weights are stored; the value is the name in reports and errors."""

    BLOCK_FP8 = "block FP8"
    E5M2 = "FP8 in e5m2"
    EXPONENTS = "block FP8 with E8M0 scales"
    STATIC_FP8 = "FP8 with scales of activations"
    TENSOR_FP8 = "per-tensor FP8"
    NVFP4 = "NVFP4"
    MXFP4 = "MXFP4"
    GPTQ = "GPTQ"
    AWQ = "AWQ"
    FOUR_BIT = "bitsandbytes 4-bit"
    BITSANDBYTES = "bitsandbytes"
    COMPRESSED = "compressed-tensors"
    INTEGERS = "packed integers"
    OTHER = "a format unknown here"


#: Formats that qcore decodes.
READABLE = (Format.BLOCK_FP8, Format.FOUR_BIT)
_FP8 = (Format.BLOCK_FP8, Format.E5M2, Format.EXPONENTS, Format.STATIC_FP8, Format.TENSOR_FP8)
_ANY = tuple(Format)
#: ``quant_method`` of config.json -> the formats that it may mean.
_METHODS: Mapping[str, tuple[Format, ...]] = {
    "fp8": _FP8,
    "fbgemm_fp8": (Format.TENSOR_FP8,),
    "modelopt": (*_FP8, Format.NVFP4, Format.MXFP4, Format.INTEGERS),
    "modelopt_fp4": (Format.NVFP4,),
    "mxfp4": (Format.MXFP4,),
    "gptq": (Format.GPTQ,),
    "awq": (Format.AWQ,),
    "auto-round": _ANY,
    "bitsandbytes": (Format.FOUR_BIT, Format.BITSANDBYTES),
    "compressed-tensors": (*_FP8, Format.COMPRESSED),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """The quantized weights of a checkpoint.

    Attributes:
        formats: format -> number of weights, the most frequent first.
        first: header of the first weight of the most frequent format.
        block: (rows, columns) that share a scale, for block FP8.
        base: hub id of the checkpoint that it was made from, if recorded.
        scales: name on disk of a block FP8 weight -> header of its scales.
        four_bit: name on disk of a weight that bitsandbytes stored in 4 bits -> its state.
    """

    formats: Mapping[Format, int]
    first: Header
    block: tuple[int, int] | None = None
    base: str | None = None
    scales: Mapping[str, Header] = field(default_factory=dict)
    four_bit: Mapping[str, FourBit] = field(default_factory=dict)

    @property
    def readable(self) -> bool:
        """Whether the weights can be decoded."""
        return self.formats.keys() <= {*READABLE}

    @property
    def carried(self) -> bool:
        """Whether a merge can carry the weights: the tensors that make up each are known."""
        return Format.OTHER not in self.formats

    @property
    def name(self) -> str:
        """The format, or all formats joined by "and"."""
        return " and ".join(self.formats)

    def line(self) -> str:
        """Return one line for the terminal."""
        text = ", ".join(f"{count} weights in {kind.value}" for kind, count in self.formats.items())
        if self.block is not None:
            text += f" of {self.block[0]} x {self.block[1]}"
        return text + (f", made from {self.base}" if self.base else "")

    def as_json(self) -> dict[str, Any]:
        """Return the record for ``--json`` and manifests."""
        return {
            "format": self.name,
            "weights": {kind.value: count for kind, count in self.formats.items()},
            "block": list(self.block) if self.block is not None else None,
            "base": self.base,
            "readable": self.readable,
        }

    def refusal(self, checkpoint: Checkpoint) -> InputError:
        """Return the error for a format that is not `readable`."""
        return InputError(
            "QC-CKPT-008",
            "is already quantized, in a format that qcore cannot train on or merge into",
            file=checkpoint.path / self.first.file,
            field=self.first.name,
            found=", ".join(f"{count} x {kind.value}" for kind, count in self.formats.items()),
            expected="bf16, FP8 with block scales, or 4 bits of bitsandbytes",
            fix=self.instead(),
        )

    def instead(self) -> str:
        """Return the fix: which checkpoint to use instead."""
        if self.base is not None:
            return f"name {self.base}, the bf16 checkpoint that it was made from"
        return "name the bf16 checkpoint that it was made from"


def detect_quantization(checkpoint: Checkpoint) -> Quantization | None:
    """Detect the quantized weights of a checkpoint; ``None`` if there are none.

    Raises:
        InputError: ``QC-CKPT-010`` config.json or hf_quant_config.json contradicts the tensors.
    """
    by_name = dict(quantized_weights(checkpoint.headers))
    declarations = list(_declarations(checkpoint))
    if declarations and not by_name:
        by_name = dict(_undetected(checkpoint.headers))
    formats = Counter(by_name.values())
    for file, field_path, value in declarations:
        _check_declaration(checkpoint, formats, file, field_path, value)
    if not by_name:
        return None
    ordered = dict(formats.most_common())
    first = next(name for name, kind in by_name.items() if kind is next(iter(ordered)))
    blocks = [name for name, kind in by_name.items() if kind is Format.BLOCK_FP8]
    scales = ((name, checkpoint.headers.get(scale_name(name))) for name in blocks)
    return Quantization(
        formats=ordered,
        first=checkpoint.headers[first],
        block=_block(checkpoint) if blocks else None,
        base=_base(checkpoint),
        scales={name: scale for name, scale in scales if scale is not None},
        four_bit=four_bit_weights(checkpoint)[0] if Format.FOUR_BIT in formats else {},
    )


def quantized_weights(headers: Mapping[str, Header]) -> Iterator[tuple[str, Format]]:
    """Yield the quantized weights with their format; skip scales and other companions."""
    for name, header in headers.items():
        if header.dtype not in _PLAIN:
            kind = _format(name, header, headers)
            if kind is not None:
                yield name, kind


def _undetected(headers: Mapping[str, Header]) -> Iterator[tuple[str, Format]]:
    """Yield all tensors that may be quantized, for a format that only config.json declares."""
    for name, header in headers.items():
        if header.dtype not in (*_PLAIN, *_NOT_WEIGHTS):
            yield name, Format.OTHER


def _format(name: str, header: Header, headers: Mapping[str, Header]) -> Format | None:
    """Return the format of a tensor that is not a plain float.

    ``None`` if it is not a weight, or if the format is unknown.
    """
    stem, _, leaf = name.rpartition(".")
    if header.dtype.startswith("F8_"):
        return _fp8(name, header, headers)
    if header.dtype == "I32" and leaf == "qweight":
        return _packed_ints(stem, header, headers)
    if leaf == "weight_packed":
        return Format.COMPRESSED
    if header.dtype == "I8":
        if f"{stem}.SCB" in headers:
            return Format.BITSANDBYTES
        return Format.COMPRESSED if f"{name}_scale" in headers else None
    if header.dtype in ("U8", "F4"):
        if f"{name}_scale_2" in headers or f"{name}_weight_scale_2" in headers:
            return Format.NVFP4
        if f"{name}.absmax" in headers:
            return Format.FOUR_BIT if has_state(name, headers) else Format.BITSANDBYTES
        if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in headers:
            return Format.MXFP4
        scale = headers.get(f"{name}_scale")
        if scale is not None:
            return Format.INTEGERS if scale.dtype in _PLAIN else Format.MXFP4
    return None


def _fp8(name: str, header: Header, headers: Mapping[str, Header]) -> Format | None:
    for end in ("_scale_inv", "_weight_scale", "_scale"):
        weight = name.removesuffix(end)
        if weight != name and (weight in headers or f"{weight}_packed" in headers):
            return None  # a scale itself
    if f"{name}_scale" in headers:
        return Format.TENSOR_FP8
    scale = headers.get(f"{name}_scale_inv")
    if scale is None:
        return Format.BLOCK_FP8  # `locate` reports the missing scales
    if len(scale.shape) < max(2, len(header.shape)):
        return Format.TENSOR_FP8
    if header.dtype != "F8_E4M3":
        return Format.E5M2
    if scale.dtype not in _PLAIN:
        return Format.EXPONENTS
    stem = name.removesuffix(".weight")
    static = any(f"{stem}.{leaf}" in headers for leaf in ("activation_scale", "input_scale"))
    return Format.STATIC_FP8 if static else Format.BLOCK_FP8


def _packed_ints(stem: str, weight: Header, headers: Mapping[str, Header]) -> Format:
    """Distinguish by shape: GPTQ packs inputs, AWQ packs outputs, scales cover all outputs."""
    scales = headers.get(f"{stem}.scales")
    if f"{stem}.g_idx" in headers or scales is None:
        return Format.GPTQ
    return Format.GPTQ if weight.shape[-1:] == scales.shape[-1:] else Format.AWQ


def _declarations(checkpoint: Checkpoint) -> Iterator[tuple[str, str, str]]:
    """Yield (file, field, value) of every declared quantization format."""
    for path, value in quantization_sections(checkpoint.config):
        if not isinstance(value, Mapping):
            yield "config.json", path, repr(value)
            continue
        if "quant_method" in value or "quant_algo" not in value:
            yield "config.json", f"{path}.quant_method", str(value.get("quant_method"))
        if "quant_algo" in value:
            yield "config.json", f"{path}.quant_algo", str(value["quant_algo"])
    if _MODELOPT_CONFIG in checkpoint.sidecars:
        section = read_json(checkpoint.file(_MODELOPT_CONFIG)).get("quantization")
        if isinstance(section, Mapping) and section.get("quant_algo"):
            yield _MODELOPT_CONFIG, "quantization.quant_algo", str(section["quant_algo"])


def _declared_formats(field_path: str, value: str) -> tuple[Format, ...]:
    """Return the formats that a declared value may mean; an unknown value may mean any."""
    if not field_path.endswith("quant_algo"):
        return _METHODS.get(value, _ANY)
    algo = value.upper()
    if "NVFP4" in algo:
        return (Format.NVFP4,)
    if "MXFP4" in algo:
        return (Format.MXFP4,)
    return _FP8 if algo.startswith("FP8") else _ANY


def _check_declaration(
    checkpoint: Checkpoint, formats: Mapping[Format, int], file: str, field_path: str, value: str
) -> None:
    """Raise ``QC-CKPT-010`` unless a weight has one of the declared formats."""
    declared = _declared_formats(field_path, value)
    if Format.OTHER in formats or any(kind in formats for kind in declared):
        return
    section = f"this {SECTION}" if file == "config.json" else file
    plain = f"; or remove {section}, if these are the weights of a 16-bit model"
    raise InputError(
        "QC-CKPT-010",
        "contradicts the safetensors files",
        file=checkpoint.path / file,
        field=field_path,
        found=value,
        expected=" and ".join(formats) or "nothing: no tensor is quantized",
        fix=f"use the {file} that came with the weights" + ("" if formats else plain),
    )


def _block(checkpoint: Checkpoint) -> tuple[int, int]:
    """Return the (rows, columns) that share a scale, with an invalid size as ``QC-CKPT-010``."""
    try:
        return block_size(checkpoint.config)
    except BadBlockError as error:
        raise InputError(
            "QC-CKPT-010",
            "contradicts the safetensors files, which contain FP8 with block scales",
            file=checkpoint.path / "config.json",
            field=error.field,
            found=repr(error.value)[:80],
            expected="rows and columns, two positive integers",
            fix="use the config.json that came with the weights",
        ) from None


def _base(checkpoint: Checkpoint) -> str | None:
    """Return the hub id of the base model, from the quantization config or the model card."""
    for _, section in quantization_sections(checkpoint.config):
        for key in ("base_model", "base_model_name_or_path"):
            name = section.get(key)
            if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
                return name
    if "README.md" not in checkpoint.sidecars:
        return None
    with checkpoint.file("README.md").open("rb") as file:
        text = file.read(_CARD_BYTES).decode("utf-8", "replace")
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    match = _CARD_BASE.search(head[1]) if head else None
    return match[1] if match else None
