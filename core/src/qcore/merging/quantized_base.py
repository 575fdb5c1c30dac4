"""What a merge does with a quantized base: carry its weights, decode them, or refuse.

This file decides that the bytes of quantized weights are copied unless the user asks for something
else, and that an adapter which changes such a weight is therefore refused, by the name of the
tensor. It reads no tensor. `qcore.merging.plan` decides the files, `qcore.checkpoint.packed` which
tensors make up a weight.

Codes: ``QC-MERGE-008`` the adapter changes weights that ``--dequantize`` decodes, ``-009``
``--dequantize`` or ``--requantize`` without effect; ``QC-CKPT-008`` weights that qcore does not
decode.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..adapter.peft_names import Adapter
from ..checkpoint.layout import Located, Place
from ..checkpoint.quantization_formats import Quantization
from ..errors import InputError, UsageError
from ..plugins.resolve_model import Identified
from .plan import MergePlan


def check_options(base: Identified, dequantize: bool, requantize: bool) -> None:
    """Refuse ``--dequantize`` or ``--requantize`` for a base of which nothing can be decoded.

    Raises:
        UsageError: ``QC-MERGE-009`` the base is not quantized, or both are given, or
            ``--requantize`` for a base that is not in block FP8.
        InputError: ``QC-CKPT-008`` it is, in a format that qcore does not decode.
    """
    quantized = base.quantization
    option = "--requantize" if requantize else "--dequantize"
    if not dequantize and not requantize:
        return
    if quantized is None:
        raise _useless(
            option,
            "is given, and nothing is to be decoded",
            f"{base.checkpoint.source} is not quantized",
            "leave it out: the output has the dtypes of the base",
        )
    if dequantize and requantize:
        raise _useless(option, "is given with --dequantize", "both", "leave out one of them")
    if not quantized.readable:
        raise quantized.refusal(base.checkpoint)
    if requantize and not quantized.scales:
        raise _useless(
            option,
            "is given for a base that is not in FP8 with block scales",
            quantized.line(),
            "pass --dequantize, which writes it in 16 bits",
        )


def _useless(option: str, what: str, found: str, fix: str) -> UsageError:
    return UsageError("QC-MERGE-009", what, field=option, found=found, fix=fix)


def refuse_targets(
    base: Identified, adapter: Adapter, dequantize: bool, requantize: bool = False
) -> None:
    """Refuse an adapter that changes a quantized weight, unless it is decoded.

    Raises:
        InputError: ``QC-MERGE-008``, ``QC-CKPT-008``; both name the first such weight.
        UsageError: ``QC-MERGE-009`` `requantize`, and no such weight changes.
    """
    quantized = base.quantization
    if quantized is None or dequantize:
        return
    located = [base.layout.located[name] for name in adapter.changes]
    places = [
        place
        for item in located
        if (place := quantized_place(item)) is not None
        and not (requantize and place.scale is not None)
    ]
    if places:
        raise _refused(base, quantized, min(places, key=lambda place: place.header.name), places)
    if requantize and not any(place.scale for item in located for place in item.places):
        raise _useless(
            "--requantize",
            "is given, and the adapter changes no weight in FP8",
            f"{len(located)} changed weights, all in 16 bits or wider",
            "leave it out: weights in FP8 keep their bytes",
        )


def quantized_place(item: Located) -> Place | None:
    """Return the first place of a weight that is quantized; ``None`` if it is plain."""
    return next((p for p in item.places if p.packed or p.scale or p.four_bit), None)


def _refused(
    base: Identified, quantized: Quantization, first: Place, places: list[Place]
) -> InputError:
    file = base.checkpoint.path / first.header.file
    others = f", and {len(places) - 1} more targets" if len(places) > 1 else ""
    packed = next((place for place in places if place.packed is not None), None)
    if packed is not None:
        return InputError(
            "QC-CKPT-008",
            "is a target of the adapter, and stored in a format that qcore cannot merge into",
            file=base.checkpoint.path / packed.header.file,
            field=packed.header.name,
            found=f"{packed.packed}{others}",
            expected="an adapter that changes only weights that are not quantized",
            fix=quantized.instead(),
        )
    return InputError(
        "QC-MERGE-008",
        f"is a target of the adapter, and is in {first_format(first)}, which is too coarse to hold "
        "its changes",
        file=file,
        field=first.header.name,
        found=f"{quantized.line()}{others}",
        fix=f"pass --dequantize to write all of it in 16 bits, {_again(first)}or "
        f"{quantized.instead()}",
    )


def _again(place: Place) -> str:
    if place.scale is None:
        return ""
    return "or --requantize to round what changes to FP8 again, "


def first_format(place: Place) -> str:
    """Return the name of the format of a weight that can be decoded."""
    return "FP8" if place.four_bit is None else "4 bits"


def notes(
    base: Identified, adapter: Adapter, dequantize: bool, requantize: bool = False
) -> Iterator[str]:
    """Yield what the user must know of the quantized weights of the output."""
    quantized = base.quantization
    if quantized is None:
        return
    what = "decoded to 16 bits" if dequantize else "kept as they are, byte for byte"
    if requantize:
        what = "kept byte for byte, or rounded to FP8 again where the adapter changes them"
    yield f"{base.checkpoint.path}: {quantized.line()}: they are {what}"
    if not dequantize and (parts := incomparable_parts(base, adapter)):
        yield (
            f"warning: the quantized weights of part '{min(parts)}' are not compared with those "
            "that the adapter was trained on; all others are"
        )


def incomparable_parts(base: Identified, adapter: Adapter) -> set[str]:
    """Return the parts whose carried weights have other values than in training, or none.

    They are parts of a base with quantized weights, and the adapter was trained on plain ones. An
    adapter that was trained on decoded values is compared with these.
    """
    model = adapter.meta.get("model", {})
    recorded = model.get("quantization", model.get("quantisation"))  # as older manifests spell it
    if recorded is not None and recorded.get("readable"):
        return set()
    located = base.layout.located.values()
    parts = {item.tensor.part.name for item in located if quantized_place(item) is not None}
    return parts & adapter.fingerprints.keys()


def decoded_record(base: Identified, plan: MergePlan) -> dict[str, Any] | None:
    """Return what the manifest records of decoded weights; ``None`` where there are none."""
    quantized = base.quantization
    if quantized is None or not plan.decoded:
        return None
    dtypes = {patch.written.dtype for patch in plan.patches() if patch.decoded}
    to = " and ".join(sorted(dtype.lower() for dtype in dtypes))
    return {"from": quantized.name, "to": to, "tensors": plan.decoded}
