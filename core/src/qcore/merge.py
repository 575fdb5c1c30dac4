"""Merge: base + adapter -> a drop-in checkpoint, tensor by tensor.

This file decides that a merged checkpoint is its base, file by file: the same shards with the
same headers in the same order, the same sidecars; only tensors that the adapter touches get
other bytes, ``W + scaling * (B A)[region]`` computed in float64 and rounded once, so that no
other way to merge is closer on any tensor. Nothing goes through a model class, so what
training did not load is kept as it was.

In one pass each tensor's bytes are hashed for the fingerprint, changed or copied, hashed again
for the manifest, and written; a tensor that lies in pieces is read once more for its hash, and
the proof reads the layers again. A mismatch with the base that the adapter was trained on stops
the merge at the first tensor. Memory is the adapter and a few tensors.

The checks after it: names, shapes, dtypes equal to the base's; every adapter tensor used;
values finite; what a pair touches changed, or is named; and, by `prove`, logits of the
unrounded merge equal to base + adapter, and the files hold that merge, rounded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adapter import WEIGHTS, Adapter
from .adapter_reader import read_adapter
from .artifact import MANIFEST, check_target, publish, read_manifest
from .checkpoint import INDEX, Checkpoint, Header, read_headers
from .deltas import Deltas, one_thread, single
from .errors import InputError, NumericError
from .fingerprint import fingerprints
from .identify import Identified, identify
from .load import DTYPES, as_bytes, read_exact, read_tensor
from .load import digest as digest_of
from .preflight import preflight
from .report import Advance, Reporter, Silent

_WORKERS, _AHEAD = 2, 4  # threads that add up, and tensors in flight
_COPY = 8 * 2**20  # bytes in flight when a tensor is only copied


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
    reporter: Reporter | None = None,
) -> MergeReport:
    """Write ``base + adapter`` to `output`.

    Raises:
        InputError: the adapter is not for this base (``QC-MERGE-001``), is already in it
            (``-002``), or its folder or the base's are not as they must be.
        NumericError: ``QC-MERGE-003`` a value that is not finite, ``-004`` nothing changed,
            ``-005`` logits of the merge differ from base + adapter, ``-006`` and ``-007`` the
            files do not hold what they should.
        WriteError: the output exists or cannot be written; nothing half-written stays.
    """
    tell = reporter or Silent()
    target = check_target(output)
    found = identify(model, generation=generation)
    told = read_adapter(adapter, found.layout, trust_base=trust_base, claims=found.adapter_claims)
    already = _refuse_twice(found.checkpoint, told)
    warnings = preflight(found, verb="merge", settings={})
    for line in (*found.decision.evidence, *warnings):
        tell.note(line)
    size = found.checkpoint.total_bytes
    merger = _Merger(found, told)
    with publish(target, kind="model", need_bytes=size) as out:
        with one_thread(), tell.progress("merging", size, "bytes") as advance:
            for shard in found.checkpoint.shards:
                with out.stream(shard) as file:
                    for chunk in merger.shard(shard, advance):
                        file.write(chunk)
        for name in found.checkpoint.sidecars:
            if name != MANIFEST:
                out.copy(name, found.checkpoint.file(name))
        if found.checkpoint.index is not None:
            out.copy(INDEX, found.checkpoint.file(INDEX))
        merger.check()
        _check_headers(found.checkpoint, out.folder)
        proof = _prove(found, told, out.folder, tell) if prove else None
        out.meta.update(_meta(found, told, merger, already, proof))
    return MergeReport(
        output=target,
        tensors=len(found.checkpoint.headers),
        changed=merger.changed,
        unchanged=tuple(merger.unchanged),
        pairs=len(told.pairs),
        parameters=merger.parameters,
        largest_change=merger.largest,
        warnings=warnings,
        proof=proof,
    )


def _prove(found: Identified, adapter: Adapter, written: Path, tell: Reporter) -> dict[str, float]:
    from .prove import prove_merge  # it needs `Deltas`

    with tell.progress("proving", found.checkpoint.total_bytes, "bytes") as advance:
        return prove_merge(found, adapter, written, advance)


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
    merger: _Merger,
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
                "tensors_changed": merger.changed,
                "tensors_unchanged": merger.unchanged,
            },
        ],
        "proof": dict(proof) if proof is not None else None,
    }


class _Changed(NamedTuple):
    """A merged tensor and its largest change."""

    name: str
    weight: Tensor
    moved: float


@dataclass(slots=True)
class _Merger:
    """One pass over the base's files."""

    found: Identified
    adapter: Adapter
    deltas: Deltas = field(init=False)
    digests: dict[str, str] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    changed: int = 0
    unchanged: list[str] = field(default_factory=list)
    parameters: int = 0
    largest: float = 0.0

    def __post_init__(self) -> None:
        self.deltas = Deltas(self.adapter)

    def shard(self, name: str, progress: Advance) -> Iterator[memoryview]:
        """The bytes of one merged shard, in order.

        Changed tensors are read, hashed and added up by two threads, a few ahead of the one
        that copies the others and writes.
        """
        checkpoint = self.found.checkpoint
        path = checkpoint.file(name)
        headers = [header for header in checkpoint.headers.values() if header.file == name]
        headers.sort(key=lambda header: header.start)
        with path.open("rb") as file, ThreadPoolExecutor(_WORKERS, initializer=single) as pool:
            yield memoryview(file.read(headers[0].start if headers else path.stat().st_size))
            coming = (h for h in headers if self._touched(h))
            jobs = {h.name: pool.submit(self._change, path, h) for h in islice(coming, _AHEAD)}
            for header in headers:
                if header.name in jobs:
                    yield self._take(header, jobs.pop(header.name).result())
                    for following in islice(coming, 1):
                        jobs[following.name] = pool.submit(self._change, path, following)
                else:
                    file.seek(header.start)
                    yield from self._copy(file, header)
                progress(header.end - header.start)

    def _touched(self, header: Header) -> bool:
        tensor, _ = self.found.layout.by_disk.get(header.name, (None, ()))
        return tensor is not None and tensor.name in self.adapter.pairs

    def _copy(self, file: Any, header: Header) -> Iterator[memoryview]:
        digest = hashlib.sha256()
        left = header.end - header.start
        buffer = bytearray(min(_COPY, left))
        while left:
            view = memoryview(buffer)[: min(left, len(buffer))]
            read_exact(file, view, header)
            digest.update(view)
            yield view
            left -= len(view)
        self._note(header, digest.hexdigest())

    def _change(self, path: Path, header: Header) -> _Changed:
        """Read one tensor, hash it, and add its delta; runs beside others of its kind."""
        tensor, region = self.found.layout.by_disk[header.name]
        dtype = DTYPES.get(header.dtype)
        if dtype is None:
            raise InputError(
                "QC-LOAD-001",
                "is stored in a dtype that cannot be merged into",
                file=path,
                field=header.name,
                found=header.dtype,
                expected=", ".join(DTYPES),
                fix="merge into the bf16 revision of this checkpoint",
            )
        weight = torch.empty(header.shape, dtype=dtype)
        with path.open("rb") as file:
            file.seek(header.start)
            read_exact(file, as_bytes(weight), header)
        self._note(header, hashlib.sha256(as_bytes(weight)).hexdigest())
        moved = 0.0
        rows = slice(region[0].start, region[0].stop)
        for block, total in self.deltas.add(tensor.name, weight, rows):
            old = weight[block].float()
            new = weight[block].copy_(total)
            change = float((new.float() - old).abs().max())
            if not bool(old.isfinite().all()):
                raise NumericError(
                    "QC-LOAD-003",
                    "holds a value that is not finite",
                    file=path,
                    field=header.name,
                    fix="download the checkpoint again",
                )
            if not math.isfinite(change):
                raise NumericError(
                    "QC-MERGE-003",
                    "is not finite after the merge",
                    file=self.adapter.path,
                    field=header.name,
                    fix="train again with a lower learning_rate",
                )
            moved = max(moved, change)
        return _Changed(tensor.name, weight, moved)

    def _take(self, header: Header, changed: _Changed) -> memoryview:
        """Book a changed tensor; its bytes."""
        self.done.add(changed.name)
        self.largest = max(self.largest, changed.moved)
        if changed.moved:
            self.changed += 1
            self.parameters += header.numel
        else:
            self.unchanged.append(header.name)
        return as_bytes(changed.weight)

    def _note(self, header: Header, digest: str) -> None:
        """Keep the digest of a canonical tensor; compare it with the adapter's record."""
        tensor, _ = self.found.layout.by_disk.get(header.name, (None, ()))
        if tensor is None:
            return
        item = self.found.layout.located[tensor.name]
        if len(item.places) > 1:
            if tensor.name in self.digests:
                return
            digest = digest_of(read_tensor(self.found.checkpoint, item))
        self.digests[tensor.name] = digest
        recorded = self.adapter.meta.get("tensors", {}).get(tensor.name)
        if recorded is not None and recorded != digest:
            raise self._other_base(header.name, f"sha256 {digest[:12]}", f"{recorded[:12]}")

    def _other_base(self, field: str, found: str, expected: str) -> InputError:
        return InputError(
            "QC-MERGE-001",
            "is not the base that the adapter was trained on",
            file=self.found.checkpoint.path,
            field=field,
            found=found,
            expected=expected,
            fix=f"name {self.adapter.meta.get('model', {}).get('source', 'its base')}",
        )

    def check(self) -> None:
        """Every pair was used, something changed, and the base is the recorded one."""
        unused = self.adapter.pairs.keys() - self.done
        if unused:
            raise NumericError(
                "QC-MERGE-004",
                "was not applied",
                file=self.adapter.path,
                field=min(unused),
                fix="report this: the adapter was accepted and then not used",
            )
        if not self.changed:
            raise NumericError(
                "QC-MERGE-004",
                "changes no weight of the base",
                file=self.adapter.path,
                found=f"{len(self.adapter.pairs)} pairs, largest change 0",
                fix="train longer, or with a higher learning_rate",
            )
        now = fingerprints(self.found.layout, self.digests)
        for part, recorded in self.adapter.fingerprints.items():
            if now.get(part) != recorded:
                raise self._other_base(f"part '{part}'", str(now.get(part))[:12], recorded[:12])


def _check_headers(base: Checkpoint, folder: Path) -> None:
    """Names, shapes, dtypes, files and offsets of the output are the base's."""
    for shard in base.shards:
        written = {header.name: header for header in read_headers(folder / shard)}
        expected = {name: h for name, h in base.headers.items() if h.file == shard}
        if written != expected:
            raise NumericError(
                "QC-MERGE-006",
                "does not have the tensors of the base",
                file=folder / shard,
                found=f"{len(written)} tensors",
                expected=f"{len(expected)}",
                fix="report this: the writer broke its contract",
            )
