"""`qcore merge`: base + adapter become a drop-in checkpoint, tensor by tensor.

This file decides that a merged checkpoint is its base, file by file: the same shards with the
same headers in the same order, and the same other files. Only tensors that the adapter touches
change: ``W + scaling * (B A)[region]`` is computed in float64 and rounded once, so that no merge
is closer on any tensor. Nothing goes through a model class, so tensors that training did not load
stay as they are. So do the quantized weights of a base (`quantized_base`). A base in block FP8
or in 4 bits of bitsandbytes is written in 16 bits, all of it, when the user asks for that (`plan`):
training saw its decoded values.

An adapter is merged into every part that it was trained with: one that changed a tower, or
was trained on media with the tower frozen, needs a base that has the tower and a plugin that knows
it.

One pass (`rewrite`) hashes the bytes of each tensor for the fingerprint, changes or copies them,
hashes them again for the manifest, and writes them. A base other than the one that the adapter was
trained on stops the merge at its first tensor that differs.

Then these are checked: names, shapes and dtypes are those of the base; every adapter tensor was
used; changed values are finite and no change is absurdly large (`value_checks`); each tensor that a
pair touches has changed, or is named; and (`verify`) logits of the unrounded merge equal those of
base + adapter, and the files hold that merge, rounded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..adapter.base_check import media_notes, refuse_parts
from ..adapter.combined import Weighted, combined
from ..adapter.delta import one_thread
from ..adapter.evidence import brings_template, evidence_lines
from ..adapter.expert_layout import OLDER
from ..adapter.peft_names import Adapter
from ..adapter.read_several import one_of, read_adapters
from ..adapter.taken_tokenizer import TakenTokenizer, plan_tokenizer, taken_lines
from ..adapter.weight_files import weights_digest
from ..checkpoint.chat_template import Template
from ..checkpoint.checkpoint import Checkpoint, read_headers
from ..checkpoint.fingerprint import fingerprints
from ..checkpoint.tokenizer_files import TokenizerFiles
from ..data.rendering.template_kwargs import mixed_modes, other_template, recorded_variables
from ..errors import InputError, NumericError
from ..io.artifact import MANIFEST, Writer, check_target, publish, read_manifest
from ..plugins.resolve_model import Identified, identify
from ..preflight.checks import preflight
from ..reporting import Finished, Reporter, RunStarted
from .grown_output import grown_lines
from .plan import MergePlan
from .quantized_base import check_options, decoded_record, notes, refuse_targets
from .rewrite import MergePass
from .several import AdapterPart, prove_parts
from .untied_output import untied_lines
from .value_checks import not_finite_line
from .verify import prove_merge


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """The result of `merge`.

    Attributes:
        output: the published folder.
        tensors: tensors on disk.
        changed: tensors on disk whose bytes differ from those of the base.
        unchanged: tensors that a LoRA pair touches and that round back to those of the base.
        pairs: LoRA pairs, each applied once.
        replaced: weights of which saved values replaced all or some rows, each once.
        parameters: parameters of the changed tensors.
        largest_change: largest absolute change of one value.
        largest_ratio: largest norm of a tensor's change, as a multiple of that of the tensor.
        decoded: tensors that are quantized in the base and in 16 bits in the output.
        warnings: what preflight reported.
        proof: the comparison with base + adapter; ``None`` where it was switched off.
        adapters: the part of each of several adapters; empty for one, and without the proof.
        requantized: rounding errors of the weights that are in FP8 again, by name on disk.
        not_finite: tensors with a NaN or an infinity of the base, which are copied as they are.
    """

    output: Path
    tensors: int
    changed: int
    unchanged: tuple[str, ...]
    pairs: int
    replaced: int
    parameters: int
    largest_change: float
    largest_ratio: float
    decoded: int
    warnings: tuple[str, ...]
    proof: Mapping[str, float] | None
    adapters: tuple[AdapterPart, ...] = ()
    requantized: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    not_finite: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The payload of ``qcore merge --json``."""
        return {**asdict(self), "output": str(self.output)}


def merge(
    model: str,
    adapter: str | Path | Mapping[str, float],
    output: str | Path,
    *,
    trust_base: bool = False,
    trust_generation: bool = False,
    generation: str = "",
    prove: bool = True,
    dequantize: bool = False,
    requantize: bool = False,
    take_tokenizer: bool = False,
    allow_large_change: bool = False,
    reporter: Reporter | None = None,
) -> MergeReport:
    """Write ``base + adapter`` to `output`.

    Args:
        model: the base: a folder or a hub id.
        adapter: the adapter's folder or hub id; several of them with the weight of each.
        output: the folder to publish; absent or empty.
        trust_base: accept an adapter without a fingerprint of its base.
        trust_generation: accept such an adapter if it names a base of another generation.
        generation: accepted only where evidence is missing, never against it.
        prove: compare logits and the files with what training computes.
        dequantize: write a base in block FP8 or in 4 bits in 16 bits, all of it.
        requantize: write changed weights in block FP8 in that format again, with new scales.
        take_tokenizer: write the tokenizer and template that the adapter brings, not the base's.
        allow_large_change: merge an adapter that changes a weight by many times its norm.
        reporter: receives events; silent by default.

    Raises:
        UsageError: ``QC-MERGE-009`` and ``-010``: `dequantize` or `take_tokenizer` without effect.
        InputError: the adapter is not for this base (``QC-MERGE-001``), is already in it
            (``-002``), it changes a quantized weight and `dequantize` is not set (``-008``, or
            ``QC-CKPT-008``), it depends on a part that is not there (``QC-ADAPTER-012``), several
            cannot be added (``-018``, ``-020``), or a folder is not as it must be.
        NumericError: ``QC-MERGE-003`` not finite, ``-004`` nothing changed, ``-005`` logits differ
            from base + adapter, ``-006`` and ``-007`` the files do not hold what they should,
            ``-014`` a change is too large.
        WriteError: the output exists or cannot be written; nothing half-written stays.
    """
    reporter = reporter or Reporter()
    target = check_target(output)
    base = identify(model, generation=generation, carry=True)
    check_options(base, dequantize, requantize)
    trust = {"trust_base": trust_base, "trust_generation": trust_generation}
    read = combined(adapters := read_adapters(base, adapter, **trust, grow=take_tokenizer))
    base = _for_adapter(base, read, dequantize, requantize)
    earlier = _refuse_twice(base.checkpoint, adapters)
    taken = plan_tokenizer(base, one_of(adapters)) if take_tokenizer else None
    kept = notes(base, read, dequantize, requantize)
    warnings = (*preflight(base, verb="merge"), *_notes(base, adapters, taken, kept))
    reporter.lines((*base.decision.evidence, *warnings))
    reporter.emit(RunStarted(verb="merge", model=model, output=target))
    merger = MergePass(base, read, dequantize, taken, requantize, allow_large_change)
    proof, parts = _publish(merger, target, adapters, earlier, reporter, prove)
    report = _report(merger, target, warnings, proof, parts)
    reporter.emit(Finished(verb="merge", output=target, result=report.as_json()))
    return report


def _publish(
    merger: MergePass,
    target: Path,
    adapters: Sequence[Weighted],
    earlier: list[dict[str, Any]],
    reporter: Reporter,
    prove: bool,
) -> tuple[dict[str, float] | None, Sequence[AdapterPart]]:
    """Write, check and publish the output; returns the proof, and the part of each adapter."""
    with publish(target, kind="model", need_bytes=merger.plan.size) as out:
        _write(merger, out, reporter)
        merger.check()
        _check_headers(merger.plan, out.folder)
        if merger.not_finite:
            reporter.warning(not_finite_line(merger.not_finite))
        proof = _prove(merger, out.folder, reporter) if prove else None
        parts = prove_parts(adapters, merger.deltas, merger.moved) if prove and adapters[1:] else ()
        out.meta.update(_meta(merger, adapters, parts, earlier, proof))
    return proof, parts


def _for_adapter(
    base: Identified, adapter: Adapter, dequantize: bool, requantize: bool
) -> Identified:
    """The base with what the adapter changes; refuse weights that cannot change."""
    base = base.untying() if adapter.untied else base
    base = base.growing(adapter.vocabulary)
    refuse_targets(base, adapter, dequantize, requantize)
    refuse_parts(base.layout, adapter)
    return base.using_parts(adapter.parts)  # verification computes them, so preflight checks them


def _report(
    merger: MergePass,
    target: Path,
    warnings: tuple[str, ...],
    proof: Mapping[str, float] | None,
    parts: Sequence[AdapterPart],
) -> MergeReport:
    return MergeReport(
        output=target,
        tensors=sum(1 for _ in merger.plan.patches()),
        changed=merger.changed,
        unchanged=tuple(merger.unchanged),
        pairs=len(merger.adapter.pairs),
        replaced=len(merger.adapter.changes.keys() - merger.adapter.pairs.keys()),
        parameters=merger.parameters,
        largest_change=merger.largest,
        largest_ratio=merger.sizes.largest,
        decoded=merger.plan.decoded,
        warnings=warnings,
        proof=proof,
        adapters=tuple(parts),
        requantized=_rounding(merger),
        not_finite=tuple(sorted(merger.not_finite)),
    )


def _write(merger: MergePass, out: Writer, reporter: Reporter) -> None:
    """Write the shards and the other files."""
    plan = merger.plan
    with one_thread(), reporter.progress("merging", plan.size, "bytes") as advance:
        for shard in plan.shards:
            with out.stream(shard) as file:
                for chunk in merger.shard(shard, advance):
                    file.write(chunk)
    for name in plan.copied:
        out.copy(name, merger.base.checkpoint.file(name))
    for name, source in plan.taken.items():
        out.copy(name, source)
    for name, text in plan.texts.items():
        out.write_text(name, text)


def _prove(merger: MergePass, written: Path, reporter: Reporter) -> dict[str, float]:
    """Compare the merge with base + adapter, and with the written files."""
    with reporter.progress("proving", merger.base.checkpoint.total_bytes, "bytes") as advance:
        return prove_merge(merger.base, merger.adapter, merger.deltas, written, advance)


def _notes(
    base: Identified,
    adapters: Sequence[Weighted],
    taken: TakenTokenizer | None,
    quantized: Iterator[str],
) -> Iterator[str]:
    """What the user must know of the adapters and of the output's tokenizer and template."""
    yield from quantized
    for own in adapters:
        yield from evidence_lines(base, own.adapter, taken=taken is not None)
    yield from untied_lines(base.layout)
    yield from grown_lines(base.layout)
    template = base.checkpoint.template
    if taken is not None:
        yield from taken_lines(base, taken)
        template = taken.template
    for own in adapters:
        yield from _template_notes(own.adapter, template)
        yield from media_notes(own.adapter)


def _template_notes(adapter: Adapter, template: Template | None) -> Iterator[str]:
    """How the rows of the adapter were rendered, where that differs from the output's template."""
    warning = other_template(adapter.meta, template, "the adapter")
    if warning and not brings_template(adapter):
        yield warning
    variables = recorded_variables(adapter.meta, adapter.path)
    if variables and template is not None:
        with template.reopen() as own:
            unread = ", ".join(sorted({*variables} - own.switches()))
        if unread:
            yield (
                f"warning: the adapter was trained with {unread}, which the chat template of the "
                "output does not read"
            )
    if variables:
        values = ", ".join(f"{name}={json.dumps(value)}" for name, value in variables.items())
        yield (
            f"the adapter was trained with {values}: what serves the merge must pass "
            f"chat_template_kwargs {json.dumps(dict(variables))}"
        )
    if note := mixed_modes(adapter.meta):
        yield note


def _refuse_twice(checkpoint: Checkpoint, adapters: Sequence[Weighted]) -> list[dict[str, Any]]:
    """The merges that made this base; refuse a base that already holds one of the adapters."""
    if MANIFEST not in checkpoint.sidecars:
        return []
    earlier: list[dict[str, Any]] = list(read_manifest(checkpoint.path).meta.get("merged", []))
    held = {entry.get("sha256") for entry in earlier}
    for own in adapters:
        if weights_digest(own.adapter.path) in held:
            raise InputError(
                "QC-MERGE-002",
                "already holds this adapter",
                file=checkpoint.path,
                found=own.adapter.path,
                fix="merge into the original base",
            )
    return earlier


def _meta(
    merger: MergePass,
    adapters: Sequence[Weighted],
    parts: Sequence[AdapterPart],
    earlier: list[dict[str, Any]],
    proof: Mapping[str, float] | None,
) -> dict[str, Any]:
    """What the manifest records of the merge."""
    base = merger.base
    chats = [chat for own in adapters if (chat := _chat(own.adapter))]
    return {
        "verb": "merge",
        "model": base.provenance(),
        "base_fingerprints": fingerprints(base.layout, merger.digests),
        "merged": [*earlier, *(_entry(merger, own) for own in adapters)],
        # Of adapters that were trained on other prompts, none is that of the merge.
        **({"chat": chats[0]} if chats and all(chat == chats[0] for chat in chats) else {}),
        "proof": dict(proof) if proof is not None else None,
        **({"adapters": [part.as_json() for part in parts]} if parts else {}),
        "decoded": decoded_record(base, merger.plan),
        **({"not_finite": sorted(merger.not_finite)} if merger.not_finite else {}),
        **({"requantized": requantized} if (requantized := _rounding(merger)) else {}),
    }


def _entry(merger: MergePass, own: Weighted) -> dict[str, Any]:
    """What the manifest records of one adapter."""
    adapter = own.adapter
    older = any(pair.older for pair in adapter.pairs.values())
    return {
        "adapter": adapter.source,
        "weight": own.weight,
        "revision": adapter.revision,
        "layout": adapter.layout,
        "sha256": weights_digest(adapter.path),
        "trusted_without_fingerprint": not adapter.fingerprints,
        "pairs": len(adapter.pairs),
        "replaced": len(adapter.changes.keys() - adapter.pairs.keys()),
        **({"expert_layout": OLDER} if older else {}),
        **({"tokenizer": merger.taken.as_json()} if merger.taken is not None else {}),
        "modalities": adapter.modalities,
        "tensors_changed": merger.changed,
        "tensors_unchanged": merger.unchanged,
    }


def _rounding(merger: MergePass) -> dict[str, dict[str, float]]:
    """The rounding errors of the weights that are in FP8 again, by name on disk."""
    return {name: errors.as_json() for name, errors in merger.errors.items()}


def _chat(adapter: Adapter) -> Mapping[str, Any] | None:
    """How the rows of the adapter were rendered, as it records it or as its files show it."""
    recorded: Mapping[str, Any] | None = adapter.meta.get("chat")
    if not recorded and brings_template(adapter):
        template = TokenizerFiles.of(adapter.path).template
        return {"template_sha256": template.sha256} if template is not None else None
    return recorded


def _check_headers(plan: MergePlan, folder: Path) -> None:
    """Compare names, shapes, dtypes, files and offsets of the output with the plan.

    Without decoding they are those of the base.
    """
    for name, shard in plan.shards.items():
        written = set(read_headers(folder / name))
        expected = {patch.written for patch in shard.patches}
        if written != expected:
            raise NumericError(
                "QC-MERGE-006",
                "does not have the tensors of the base",
                file=folder / name,
                found=f"{len(written)} tensors",
                expected=f"{len(expected)}",
                fix="report this: the writer broke its contract",
            )
