"""Merge: base + adapter -> a drop-in checkpoint, tensor by tensor.

This file decides that a merged checkpoint is its base, file by file: the same shards with the
same headers in the same order, the same sidecars; only tensors that the adapter touches get
other bytes, ``W + scaling * (B A)[region]`` computed in float64 and rounded once, so that no
other way to merge is closer on any tensor. Nothing goes through a model class, so what
training did not load is kept as it was. A base in block FP8 is written in bfloat16, whole, and
only when that is asked for (`merge_plan`): the values that training saw are its decoded ones.

An adapter is merged into all that it was trained on: one that changed a tower, or was trained on
media with the tower as it was, needs a base that has it and a plugin that knows it.

In one pass (`merge_pass`) each tensor's bytes are hashed for the fingerprint, changed or copied,
hashed again for the manifest, and written; the proof reads the layers again. A mismatch with the
base that the adapter was trained on stops the merge at the first tensor.

The checks after it: names, shapes, dtypes equal to the base's; every adapter tensor used;
values finite; what a pair touches changed, or is named; and, by `prove`, logits of the
unrounded merge equal to base + adapter, and the files hold that merge, rounded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapter.base_check import media_notes, refuse_parts
from ..adapter.delta import Deltas, one_thread
from ..adapter.peft_names import WEIGHTS, Adapter
from ..adapter.reader import read_adapter
from ..checkpoint.checkpoint import Checkpoint, read_headers
from ..checkpoint.fingerprint import fingerprints
from ..checkpoint.quantization_formats import Format
from ..errors import InputError, NumericError, UsageError
from ..io.artifact import MANIFEST, check_target, publish, read_manifest
from ..plugins.resolve_model import Identified, identify
from ..preflight.checks import preflight
from ..reporting import Reporter
from .plan import MergePlan
from .rewrite import MergePass


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What a merge did.

    Attributes:
        output: the published folder.
        tensors: tensors on disk.
        changed: tensors on disk with other bytes than the base's.
        unchanged: tensors that a pair touches and rounding leaves as they were.
        pairs: LoRA pairs applied, each once.
        parameters: parameters of the changed tensors.
        largest_change: largest absolute change of one value.
        decoded: tensors that the base has in FP8 and the output in bfloat16.
        warnings: what preflight had to say.
        proof: the logits check, or ``None`` when it was switched off.
    """

    output: Path
    tensors: int
    changed: int
    unchanged: tuple[str, ...]
    pairs: int
    parameters: int
    largest_change: float
    decoded: int
    warnings: tuple[str, ...]
    proof: Mapping[str, float] | None


def merge(
    model: str,
    adapter: str | Path,
    output: str | Path,
    *,
    trust_base: bool = False,
    generation: str = "",
    prove: bool = True,
    dequantize: bool = False,
    reporter: Reporter | None = None,
) -> MergeReport:
    """Write ``base + adapter`` to `output`.

    Args:
        model: the base: a folder or a hub id.
        adapter: the adapter's folder.
        output: the folder to publish; absent or empty.
        trust_base: accept an adapter without a fingerprint of its base.
        generation: accepted only where evidence is missing, never against it.
        prove: compare logits and the files with what training computes.
        dequantize: write a base in block FP8 in bfloat16: all of it, not what changes alone.
        reporter: who is told; nobody by default.

    Raises:
        UsageError: ``QC-MERGE-009`` `dequantize`, and the base is not quantised.
        InputError: the adapter is not for this base (``QC-MERGE-001``), is already in it
            (``-002``), the base is in FP8 and `dequantize` is not set (``-008``), it depends on
            a part that is not there (``QC-ADAPTER-012``), or its folder or the base's are not
            as they must be.
        NumericError: ``QC-MERGE-003`` a value that is not finite, ``-004`` nothing changed,
            ``-005`` logits of the merge differ from base + adapter, ``-006`` and ``-007`` the
            files do not hold what they should.
        WriteError: the output exists or cannot be written; nothing half-written stays.
    """
    tell = reporter or Reporter()
    target = check_target(output)
    found = identify(model, generation=generation)
    _check_dtype(found, dequantize)
    told = read_adapter(adapter, found.layout, trust_base=trust_base, claims=found.adapter_claims)
    refuse_parts(found.layout, told)
    found = found.using_parts(told.parts)  # the proof computes them, which guards judge
    already = _refuse_twice(found.checkpoint, told)
    warnings = (
        *preflight(found, verb="merge"),
        *_template_notes(found, told),
        *media_notes(told),
    )
    tell.lines((*found.decision.evidence, *warnings))
    merger = MergePass(found, told, dequantize)
    plan = merger.plan
    with publish(target, kind="model", need_bytes=plan.size) as out:
        with one_thread(), tell.progress("merging", plan.size, "bytes") as advance:
            for shard in plan.shards:
                with out.stream(shard) as file:
                    for chunk in merger.shard(shard, advance):
                        file.write(chunk)
        for name in plan.copied:
            out.copy(name, found.checkpoint.file(name))
        for name, text in plan.texts.items():
            out.write_text(name, text)
        merger.check()
        _check_headers(plan, out.folder)
        proof = _prove(found, told, merger.deltas, out.folder, tell) if prove else None
        out.meta.update(_meta(found, told, merger, already, proof))
    return MergeReport(
        output=target,
        tensors=sum(1 for _ in plan.pieces()),
        changed=merger.changed,
        unchanged=tuple(merger.unchanged),
        pairs=len(told.pairs),
        parameters=merger.parameters,
        largest_change=merger.largest,
        decoded=plan.decoded,
        warnings=warnings,
        proof=proof,
    )


def _prove(
    found: Identified, adapter: Adapter, deltas: Deltas, written: Path, tell: Reporter
) -> dict[str, float]:
    from .verify import prove_merge  # it needs `Deltas`

    with tell.progress("proving", found.checkpoint.total_bytes, "bytes") as advance:
        return prove_merge(found, adapter, deltas, written, advance)


def _template_notes(found: Identified, adapter: Adapter) -> Iterator[str]:
    """How the adapter's rows were rendered, where the merged checkpoint alone does not tell."""
    identity = adapter.meta.get("identity", {})
    template = found.checkpoint.template
    before, now = identity.get("template"), template.sha256 if template else None
    if before is not None and before != now:
        yield (
            f"the adapter was trained under another chat template (sha256 {before[:12]}) than "
            f"this base has ({str(now)[:12]}): rows render differently"
        )
    variables = identity.get("settings", {}).get("chat_template_kwargs") or {}
    if variables:
        told = ", ".join(f"{name}={json.dumps(value)}" for name, value in variables.items())
        yield f"the adapter was trained with {told}: what serves the merge must render with them"


def _check_dtype(found: Identified, dequantize: bool) -> None:
    """A base in FP8 is written in bfloat16 when that is asked for, and otherwise not at all."""
    quantised = found.quantisation
    if quantised is None and dequantize:
        raise UsageError(
            "QC-MERGE-009",
            "is given, and nothing is to be decoded",
            field="--dequantize",
            found=f"{found.checkpoint.source} is not quantised",
            fix="leave it out: the output has the dtypes of the base",
        )
    if quantised is not None and not dequantize:
        raise InputError(
            "QC-MERGE-008",
            "is in FP8, which is too coarse to hold an adapter's changes",
            file=found.checkpoint.path,
            found=quantised.line(),
            fix=f"pass --dequantize to write all of it in bf16, or {quantised.instead()}",
        )


def _refuse_twice(checkpoint: Checkpoint, adapter: Adapter) -> list[dict[str, Any]]:
    """The merges that the base already went through; refuse one that holds this adapter."""
    if MANIFEST not in checkpoint.sidecars:
        return []
    before: list[dict[str, Any]] = list(read_manifest(checkpoint.path).meta.get("merged", []))
    mine = _digest(adapter.path / WEIGHTS)
    if any(entry.get("sha256") == mine for entry in before):
        raise InputError(
            "QC-MERGE-002",
            "already holds this adapter",
            file=checkpoint.path,
            found=adapter.path,
            fix="merge into the original base",
        )
    return before


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _meta(
    found: Identified,
    adapter: Adapter,
    merger: MergePass,
    already: list[dict[str, Any]],
    proof: Mapping[str, float] | None,
) -> dict[str, Any]:
    return {
        "verb": "merge",
        "model": found.provenance(),
        "base_fingerprints": fingerprints(found.layout, merger.digests),
        "merged": [
            *already,
            {
                "adapter": str(adapter.path),
                "layout": adapter.layout,
                "sha256": _digest(adapter.path / WEIGHTS),
                "trusted_without_fingerprint": not adapter.fingerprints,
                "pairs": len(adapter.pairs),
                "modalities": adapter.modalities,
                "tensors_changed": merger.changed,
                "tensors_unchanged": merger.unchanged,
            },
        ],
        "proof": dict(proof) if proof is not None else None,
        "decoded": {"from": Format.BLOCK_FP8.value, "to": "bf16", "tensors": merger.plan.decoded}
        if merger.plan.decoded
        else None,
    }


def _check_headers(plan: MergePlan, folder: Path) -> None:
    """Names, shapes, dtypes, files and offsets of the output are those of the plan.

    Without decoding they are the base's.
    """
    for name, shard in plan.shards.items():
        written = set(read_headers(folder / name))
        expected = {piece.written for piece in shard.pieces}
        if written != expected:
            raise NumericError(
                "QC-MERGE-006",
                "does not have the tensors of the base",
                file=folder / name,
                found=f"{len(written)} tensors",
                expected=f"{len(expected)}",
                fix="report this: the writer broke its contract",
            )
