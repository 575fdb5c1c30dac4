"""What a merge does with a quantized base: carry its weights, decode them, or refuse.

This file decides that the bytes of quantized weights are copied unless the user asks for something
else, and that an adapter which changes such a weight is therefore refused, by the name of the
tensor. It reads no tensor. `qcore.merging.plan` decides the files, `qcore.checkpoint.packed` which
tensors make up a weight.

Codes: ``QC-MERGE-008`` the adapter changes weights that ``--dequantize`` decodes, ``-009``
``--dequantize`` without effect; ``QC-CKPT-008`` weights that qcore does not decode.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..adapter.peft_names import Adapter
from ..checkpoint.layout import Located, Place
from ..checkpoint.quantization_formats import Quantization
from ..errors import InputError, UsageError
from ..plugins.resolve_model import Identified


def check_options(base: Identified, dequantize: bool) -> None:
    """Refuse ``--dequantize`` for a base of which nothing can be decoded.

    Raises:
        UsageError: ``QC-MERGE-009`` the base is not quantized.
        InputError: ``QC-CKPT-008`` it is, in a format that qcore does not decode.
    """
    quantized = base.quantization
    if not dequantize:
        return
    if quantized is None:
        raise UsageError(
            "QC-MERGE-009",
            "is given, and nothing is to be decoded",
            field="--dequantize",
            found=f"{base.checkpoint.source} is not quantized",
            fix="leave it out: the output has the dtypes of the base",
        )
    if not quantized.readable:
        raise quantized.refusal(base.checkpoint)


def refuse_targets(base: Identified, adapter: Adapter, dequantize: bool) -> None:
    """Refuse an adapter that changes a quantized weight, unless it is decoded.

    Raises:
        InputError: ``QC-MERGE-008``, ``QC-CKPT-008``; both name the first such weight.
    """
    quantized = base.quantization
    if quantized is None or dequantize:
        return
    located = [base.layout.located[name] for name in adapter.changes]
    places = [place for item in located if (place := quantized_place(item)) is not None]
    if places:
        raise _refused(base, quantized, min(places, key=lambda place: place.header.name), places)


def quantized_place(item: Located) -> Place | None:
    """Return the first place of a weight that is quantized; ``None`` if it is plain."""
    return next((p for p in item.places if p.packed is not None or p.scale is not None), None)


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
        "is a target of the adapter, and is in FP8, which is too coarse to hold its changes",
        file=file,
        field=first.header.name,
        found=f"{quantized.line()}{others}",
        fix=f"pass --dequantize to write all of it in bf16, or {quantized.instead()}",
    )


def notes(base: Identified, adapter: Adapter, dequantize: bool) -> Iterator[str]:
    """Yield what the user must know of the quantized weights of the output."""
    quantized = base.quantization
    if quantized is None:
        return
    what = "decoded to bf16" if dequantize else "kept as they are, byte for byte"
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
    recorded = adapter.meta.get("model", {}).get("quantization")
    if recorded is not None and recorded.get("readable"):
        return set()
    located = base.layout.located.values()
    parts = {item.tensor.part.name for item in located if quantized_place(item) is not None}
    return parts & adapter.fingerprints.keys()
