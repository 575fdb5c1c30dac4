"""Which format a checkpoint's weights were quantised to, told from its safetensors headers.

This file decides what a format looks like (names, dtypes, shapes of the tensors that lie
together) and which can be used: FP8 with block scales, whose values are decoded to bfloat16.
All others are named, and refused with what to use instead. config.json and hf_quant_config.json
are a second witness: the files win, and a witness that contradicts them is an error, because
whoever loads the checkpoint next believes one or the other. It reads no tensor; how block FP8
is decoded says `nn.fp8`, whether its scales fit the table's tensors `locate`.

    block FP8            F8_E4M3 NAME, and NAME_scale_inv with one scale a block
    per-tensor FP8       F8_* NAME, and NAME_scale or a NAME_scale_inv that is no grid
    NVFP4                U8 NAME, F8_E4M3 NAME_scale, NAME_scale_2
    GPTQ                 I32 qweight [in / n, out], scales [groups, out], mostly g_idx
    AWQ                  I32 qweight [in, out / n], scales [groups, out], no g_idx
    bitsandbytes         U8 NAME, NAME.absmax, NAME.quant_map; or I8 NAME beside SCB
    compressed-tensors   NAME_packed; or I8 NAME and NAME_scale
    MXFP4                U8 NAME and U8 or F8_E8M0 NAME_scale; or NAME_blocks and NAME_scales
    packed integers      U8 NAME and NAME_scale in floats

Codes: ``QC-CKPT-008`` a format that cannot be used, ``-010`` a witness that contradicts the files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ..errors import InputError
from .block_scales import SECTION, BadBlockError, block_size, sections
from .checkpoint import Checkpoint, Header, read_json

_WITNESS = "hf_quant_config.json"
#: Files that some tools write beside config.json, and that describe quantised weights alone.
SIDECARS = (_WITNESS, "quant_config.json", "quantization_config.json", "quantize_config.json")

_PLAIN = ("BF16", "F32", "F16", "F64")
_NO_WEIGHT = ("BOOL", "I64", "U64")
_CARD_BYTES = 2**16
_CARD_BASE = re.compile(r"^base_model:\s*(?:\n\s*)?(?:-\s*)?[\"']?([\w.-]+/[\w.-]+)", re.MULTILINE)


class Format(str, Enum):
    """How quantised weights are stored; the value is what people call it."""

    BLOCK_FP8 = "block FP8"
    E5M2 = "FP8 in e5m2"
    EXPONENTS = "block FP8 with E8M0 scales"
    STATIC_FP8 = "FP8 with scales of activations"
    TENSOR_FP8 = "per-tensor FP8"
    NVFP4 = "NVFP4"
    MXFP4 = "MXFP4"
    GPTQ = "GPTQ"
    AWQ = "AWQ"
    BITSANDBYTES = "bitsandbytes"
    COMPRESSED = "compressed-tensors"
    INTEGERS = "packed integers"
    OTHER = "a format unknown here"


_FP8 = (Format.BLOCK_FP8, Format.E5M2, Format.EXPONENTS, Format.STATIC_FP8, Format.TENSOR_FP8)
_ANY = tuple(Format)
#: The formats that a ``quant_method`` of config.json may stand for.
_METHODS: Mapping[str, tuple[Format, ...]] = {
    "fp8": _FP8,
    "fbgemm_fp8": (Format.TENSOR_FP8,),
    "modelopt": (*_FP8, Format.NVFP4, Format.MXFP4, Format.INTEGERS),
    "modelopt_fp4": (Format.NVFP4,),
    "mxfp4": (Format.MXFP4,),
    "gptq": (Format.GPTQ,),
    "awq": (Format.AWQ,),
    "auto-round": _ANY,
    "bitsandbytes": (Format.BITSANDBYTES,),
    "compressed-tensors": (*_FP8, Format.COMPRESSED),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantisation:
    """The quantised weights of a checkpoint.

    Attributes:
        formats: number of weights by format, the most frequent first.
        first: a weight of the most frequent format, by its name on disk.
        block: rows and columns that share a scale, of block FP8.
        base: the checkpoint that it was made from, where one is recorded.
        scales: of block FP8: the scales on disk, by the weight's name on disk.
    """

    formats: Mapping[Format, int]
    first: Header
    block: tuple[int, int] | None = None
    base: str | None = None
    scales: Mapping[str, Header] = field(default_factory=dict)

    @property
    def readable(self) -> bool:
        """Whether the weights can be decoded."""
        return self.formats.keys() == {Format.BLOCK_FP8}

    @property
    def name(self) -> str:
        """The format, or the formats."""
        return " and ".join(self.formats)

    def line(self) -> str:
        """For people."""
        text = ", ".join(f"{count} weights in {kind.value}" for kind, count in self.formats.items())
        if self.block is not None:
            text += f" of {self.block[0]} x {self.block[1]}"
        return text + (f", made from {self.base}" if self.base else "")

    def as_json(self) -> dict[str, Any]:
        """For ``--json`` and manifests."""
        return {
            "format": self.name,
            "weights": {kind.value: count for kind, count in self.formats.items()},
            "block": list(self.block) if self.block is not None else None,
            "base": self.base,
            "readable": self.readable,
        }

    def refusal(self, checkpoint: Checkpoint) -> InputError:
        """Why it cannot be used, and what can; only where it is not `readable`."""
        return InputError(
            "QC-CKPT-008",
            "is already quantised, to a format that cannot be trained from or merged into",
            file=checkpoint.path / self.first.file,
            field=self.first.name,
            found=", ".join(f"{count} x {kind.value}" for kind, count in self.formats.items()),
            expected="bf16, or FP8 with block scales",
            fix=self.instead(),
        )

    def instead(self) -> str:
        """What to use in place of it."""
        if self.base is not None:
            return f"name {self.base}, the bf16 checkpoint that it was made from"
        return "name the bf16 checkpoint that it was made from"


def recognise(checkpoint: Checkpoint) -> Quantisation | None:
    """The quantised weights of a checkpoint, or ``None`` where all are plain.

    Raises:
        InputError: ``QC-CKPT-010`` where config.json or hf_quant_config.json says otherwise.
    """
    found = dict(_weights(checkpoint.headers))
    claims = list(_claims(checkpoint))
    if claims and not found:
        found = dict(_unknown(checkpoint.headers))
    formats = Counter(found.values())
    for file, name, value in claims:
        _check(checkpoint, formats, file, name, value)
    if not found:
        return None
    ordered = dict(formats.most_common())
    first = next(name for name, kind in found.items() if kind is next(iter(ordered)))
    blocks = [name for name, kind in found.items() if kind is Format.BLOCK_FP8]
    beside = ((name, checkpoint.headers.get(f"{name}_scale_inv")) for name in blocks)
    return Quantisation(
        formats=ordered,
        first=checkpoint.headers[first],
        block=_block(checkpoint) if blocks else None,
        base=_base(checkpoint),
        scales={name: scale for name, scale in beside if scale is not None},
    )


# -- the files


def _weights(headers: Mapping[str, Header]) -> Iterator[tuple[str, Format]]:
    """Quantised weights by name; scales and other companions are passed over."""
    for name, header in headers.items():
        if header.dtype not in _PLAIN:
            kind = _format(name, header, headers)
            if kind is not None:
                yield name, kind


def _unknown(headers: Mapping[str, Header]) -> Iterator[tuple[str, Format]]:
    """Where only config.json speaks of a quantisation: all tensors that could be quantised."""
    for name, header in headers.items():
        if header.dtype not in (*_PLAIN, *_NO_WEIGHT):
            yield name, Format.OTHER


def _format(name: str, header: Header, headers: Mapping[str, Header]) -> Format | None:
    """The format of one tensor that is no plain float; ``None``: no weight, or unknown."""
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
        if f"{name}_scale_2" in headers:
            return Format.NVFP4
        if f"{name}.absmax" in headers:
            return Format.BITSANDBYTES
        if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in headers:
            return Format.MXFP4
        scale = headers.get(f"{name}_scale")
        if scale is not None:
            return Format.INTEGERS if scale.dtype in _PLAIN else Format.MXFP4
    return None


def _fp8(name: str, header: Header, headers: Mapping[str, Header]) -> Format | None:
    for end in ("_scale_inv", "_scale"):
        weight = name.removesuffix(end)
        if weight != name and (weight in headers or f"{weight}_packed" in headers):
            return None  # a scale itself
    if f"{name}_scale" in headers:
        return Format.TENSOR_FP8
    scale = headers.get(f"{name}_scale_inv")
    if scale is None:
        return Format.BLOCK_FP8  # `locate` says that its scales are absent
    if len(scale.shape) < max(2, len(header.shape)):
        return Format.TENSOR_FP8
    if header.dtype != "F8_E4M3":
        return Format.E5M2
    if scale.dtype not in _PLAIN:
        return Format.EXPONENTS
    stem = name.removesuffix(".weight")
    static = any(f"{stem}.{one}" in headers for one in ("activation_scale", "input_scale"))
    return Format.STATIC_FP8 if static else Format.BLOCK_FP8


def _packed_ints(stem: str, weight: Header, headers: Mapping[str, Header]) -> Format:
    """GPTQ packs along the inputs, AWQ along the outputs; the scales have every output."""
    scales = headers.get(f"{stem}.scales")
    if f"{stem}.g_idx" in headers or scales is None:
        return Format.GPTQ
    return Format.GPTQ if weight.shape[-1:] == scales.shape[-1:] else Format.AWQ


# -- the second witness


def _claims(checkpoint: Checkpoint) -> Iterator[tuple[str, str, str]]:
    """(file, field, value) of everything that says how the weights are stored."""
    for path, value in sections(checkpoint.config):
        if not isinstance(value, Mapping):
            yield "config.json", path, repr(value)
            continue
        if "quant_method" in value or "quant_algo" not in value:
            yield "config.json", f"{path}.quant_method", str(value.get("quant_method"))
        if "quant_algo" in value:
            yield "config.json", f"{path}.quant_algo", str(value["quant_algo"])
    if _WITNESS in checkpoint.sidecars:
        told = read_json(checkpoint.file(_WITNESS)).get("quantization")
        if isinstance(told, Mapping) and told.get("quant_algo"):
            yield _WITNESS, "quantization.quant_algo", str(told["quant_algo"])


def _admits(name: str, value: str) -> tuple[Format, ...]:
    """The formats that a value stands for; what is unknown may be any."""
    if not name.endswith("quant_algo"):
        return _METHODS.get(value, _ANY)
    algo = value.upper()
    if "NVFP4" in algo:
        return (Format.NVFP4,)
    if "MXFP4" in algo:
        return (Format.MXFP4,)
    return _FP8 if algo.startswith("FP8") else _ANY


def _check(
    checkpoint: Checkpoint, formats: Mapping[Format, int], file: str, name: str, value: str
) -> None:
    """Raise ``QC-CKPT-010`` unless the files hold something that the claim stands for."""
    if Format.OTHER in formats or any(kind in formats for kind in _admits(name, value)):
        return
    claim = f"this {SECTION}" if file == "config.json" else file
    plain = f"; or remove {claim}, if these are the weights of a 16-bit model"
    raise InputError(
        "QC-CKPT-010",
        "contradicts the safetensors files",
        file=checkpoint.path / file,
        field=name,
        found=value,
        expected=" and ".join(formats) or "nothing: no tensor is quantised",
        fix="use the files that belong together" + ("" if formats else plain),
    )


def _block(checkpoint: Checkpoint) -> tuple[int, int]:
    """Rows and columns that share a scale, as config.json says; 128 each where it is silent."""
    try:
        return block_size(checkpoint.config)
    except BadBlockError as error:
        raise InputError(
            "QC-CKPT-010",
            "contradicts the safetensors files, which hold FP8 with block scales",
            file=checkpoint.path / "config.json",
            field=error.field,
            found=repr(error.found)[:80],
            expected="rows and columns, two positive integers",
            fix="use the config.json that came with the weights",
        ) from None


def _base(checkpoint: Checkpoint) -> str | None:
    """The hub id that the quantisation says it was made from, or else the model card."""
    told: Iterable[Any] = (value for _, value in sections(checkpoint.config))
    for value in told:
        for key in ("base_model", "base_model_name_or_path"):
            name = value.get(key)
            if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
                return name
    if "README.md" not in checkpoint.sidecars:
        return None
    with checkpoint.file("README.md").open("rb") as file:
        text = file.read(_CARD_BYTES).decode("utf-8", "replace")
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    named = _CARD_BASE.search(head[1]) if head else None
    return named[1] if named else None
