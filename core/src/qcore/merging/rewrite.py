"""One pass over the files of a base: every tensor is hashed, and changed or copied.

This file decides how the bytes of a merged shard are computed. A tensor that no change touches and
that is not decoded is copied. The others are read, hashed and summed by worker threads, a few
tensors ahead of the thread that copies and writes. A stack of experts is processed a few experts
at a time (a cut), so memory holds the adapter and a few tensors or cuts. Files and their headers
are planned in `plan`; the other checks of a merge are in `merge`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from ..adapter.delta import WORKERS, Deltas, single
from ..adapter.peft_names import Adapter
from ..adapter.taken_tokenizer import TakenTokenizer
from ..api.parameters import Tensor as Entry
from ..checkpoint.checkpoint import Header
from ..checkpoint.fingerprint import fingerprints
from ..checkpoint.tensor_hash import TensorDigest, in_one_run, numel
from ..errors import InputError, NumericError
from ..nn.load import DTYPES, as_bytes, hash_units, read_exact
from ..nn.value_range import is_finite
from ..plugins.resolve_model import Identified
from ..reporting import Advance
from .cuts import Cut, cuts_of, read_cut, stream
from .grown_output import grow_output
from .plan import MergePlan, TensorPatch, plan_merge
from .quantized_base import incomparable_parts
from .requantize import Errors, Requantized, requantize
from .untied_output import untie_output
from .value_checks import ChangeSizes, watched

_AHEAD = WORKERS + 2  # cuts in flight
_CUT = 2**26  # bytes of a stack that are changed at a time


class _Changed(NamedTuple):
    """A merged cut, its largest change, and the digests of the base's units in it.

    `squares` are those of the norms of the change and of the base's values. `fp8` is set for a
    weight that is written in FP8 again.
    """

    weight: Tensor
    moved: float
    units: list[tuple[int, bytes]]
    fp8: Requantized | None = None
    squares: tuple[float, float] = (0.0, 0.0)


@dataclass(slots=True)
class MergePass:
    """One pass over the files of a base, and its results.

    Attributes:
        base: the base.
        adapter: the adapter.
        dequantize: write a base in block FP8 in bfloat16.
        taken: the tokenizer files that the output takes from the adapter.
        requantize: write changed weights in block FP8 in that format again.
        allow_large_change: merge a change of any size.
        plan: what is written.
        digests: SHA-256 of the base's tensors, by canonical name.
        done: canonical names of the tensors that were changed.
        changed: tensors on disk whose bytes differ from those of the base.
        moved: canonical names of the tensors of which a value changed.
        unchanged: tensors on disk that a change touches and that round back to those of the base.
        parameters: parameters of the changed tensors.
        largest: largest absolute change of one value.
        errors: rounding errors of the weights that are written in FP8 again, by name on disk.
        sizes: relative norms of the changes.
        not_finite: tensors of the base that are copied and hold a NaN or an infinity.
    """

    base: Identified
    adapter: Adapter
    dequantize: bool = False
    taken: TakenTokenizer | None = None
    requantize: bool = False
    allow_large_change: bool = False
    plan: MergePlan = field(init=False)
    deltas: Deltas = field(init=False)
    digests: dict[str, str] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    changed: int = 0
    moved: set[str] = field(default_factory=set)
    unchanged: list[str] = field(default_factory=list)
    parameters: int = 0
    largest: float = 0.0
    errors: dict[str, Errors] = field(default_factory=dict)
    sizes: ChangeSizes = field(init=False)
    not_finite: set[str] = field(default_factory=set)
    _scales: dict[str, Tensor] = field(default_factory=dict)
    _open: dict[str, TensorDigest] = field(default_factory=dict)
    _incomparable: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        quantized = self.base.quantization if self.dequantize else None
        self.plan = plan_merge(self.base.checkpoint, quantized)
        if self.taken is not None:
            self.plan = self.plan.with_tokenizer(self.taken)
        self.plan = untie_output(self.plan, self.base.checkpoint, self.base.layout)
        self.plan = grow_output(self.plan, self.base.checkpoint, self.base.layout)
        self.deltas = Deltas(self.adapter)
        self.sizes = ChangeSizes(self.adapter.path, self.allow_large_change)
        if not self.dequantize:
            self._incomparable = incomparable_parts(self.base, self.adapter)

    def shard(self, name: str, progress: Advance) -> Iterator[memoryview]:
        """The bytes of one merged shard, in order."""
        path, shard = self.base.checkpoint.file(name), self.plan.shards[name]
        cuts = {
            patch.written.name: self._cuts_of(self._decoding(patch))
            for patch in shard.patches
            if patch.decoded or self._touched(patch.written.name)
        }
        with path.open("rb") as file, ThreadPoolExecutor(WORKERS, initializer=single) as pool:
            yield memoryview(shard.head)
            coming = (cut for patch in shard.patches for cut in cuts.get(patch.written.name, ()))
            jobs = [pool.submit(self._change, path, cut) for cut in islice(coming, _AHEAD)]
            for patch in shard.patches:
                header, name = patch.source, patch.written.name
                if (weight := self._rescaled(name)) is not None:
                    yield as_bytes(self._new_scales(weight))
                    progress(header.end - header.start)
                    continue
                if name not in cuts:
                    file.seek(header.start)
                    copied = self._copy(file, header, name)
                    yield from watched(copied, header, self.not_finite, name)
                    progress(header.end - header.start)
                    continue
                moved, scales = 0.0, []
                for _ in cuts[name]:
                    result = jobs.pop(0).result()
                    jobs += [pool.submit(self._change, path, c) for c in islice(coming, 1)]
                    self._note(name, result.units)
                    moved = max(moved, result.moved)
                    self.sizes.add(name, *result.squares)
                    if result.fp8 is not None:
                        self.errors.setdefault(name, Errors()).add(result.fp8)
                        scales.append(result.fp8.scales)
                    yield as_bytes(result.weight)
                    progress(result.weight.nbytes)
                if scales:
                    self._scales[name] = torch.cat(scales)
                if self._touched(name):
                    self.sizes.close(name)
                    self._book(patch, moved)

    def _decoding(self, patch: TensorPatch) -> TensorPatch:
        """The patch with its block scales, if it is written in FP8 again."""
        quantized = self.base.quantization
        if not self.requantize or quantized is None:
            return patch
        return replace(patch, scale=quantized.scales.get(patch.written.name))

    def _rescaled(self, name: str) -> str | None:
        """The changed weight that a tensor holds the scales of, if it is written in FP8 again."""
        weight = self.base.layout.scales.get(name) if self.requantize else None
        return weight if weight is not None and self._touched(weight) else None

    def _new_scales(self, name: str) -> Tensor:
        """The scales of a changed weight; it is computed for them if it is written later."""
        scales = self._scales.pop(name, None)
        if scales is not None:
            return scales
        header = self.base.checkpoint.headers[name]
        path = self.base.checkpoint.file(header.file)
        cuts = self._cuts_of(self._decoding(TensorPatch(header, header)))
        parts = (self._change(path, cut).fp8 for cut in cuts)
        return torch.cat([part.scales for part in parts if part is not None])

    def _touched(self, name: str) -> bool:
        entry = self._entry(name)
        return entry is not None and self._changed_as(entry) in self.adapter.changes

    def _changed_as(self, entry: Entry) -> str:
        """The weight whose change a tensor gets: its own, or that of the one it is tied to."""
        return self.base.layout.ties.get(entry.name, entry.name)

    def _entry(self, name: str) -> Entry | None:
        """The canonical tensor of a tensor that is written."""
        return self.base.layout.by_disk.get(name, (None, ()))[0]

    def _cuts_of(self, patch: TensorPatch) -> list[Cut]:
        return cuts_of(self.base.layout, patch, _CUT)

    def _copy(self, file: IO[bytes], header: Header, name: str) -> Iterator[memoryview]:
        """Copy a tensor to one of this name, and hash it unit by unit."""
        entry, region = self.base.layout.by_disk.get(name, (None, ()))
        size = header.end - header.start
        if entry is None:
            yield from stream(file, header, size, None)
            return
        patch = self._carried(header, name)
        if patch is not None:
            yield from stream(file, header, size, None)
            self._hash_decoded(patch)
            return
        shape = tuple(part.stop - part.start for part in region)
        units = self._digest(entry).inside(region)
        if not all(in_one_run(unit, shape) for _, unit in units):
            value = torch.empty(shape, dtype=DTYPES[header.dtype])
            read_exact(file, as_bytes(value), header)
            self._note(name, list(hash_units(self._digest(entry), region, value)))
            yield as_bytes(value)
            return
        each = size // header.numel if header.numel else 0
        for number, unit in units:
            digest = hashlib.sha256()
            yield from stream(file, header, numel(unit) * each, digest)
            self._note(name, [(number, digest.digest())])

    def _carried(self, header: Header, name: str) -> TensorPatch | None:
        """How a quantized tensor that is copied as it is would be decoded; ``None`` for others."""
        quantized = self.base.quantization
        if quantized is None or self.dequantize:
            return None
        scale, four_bit = quantized.scales.get(name), quantized.four_bit.get(name)
        patch = TensorPatch(header, header, scale, four_bit)
        return patch if patch.decoded else None

    def _carries(self, name: str) -> bool:
        quantized = self.base.quantization
        return quantized is not None and (name in quantized.scales or name in quantized.four_bit)

    def _hash_decoded(self, patch: TensorPatch) -> None:
        """Hash the decoded values of a tensor: the fingerprint covers those."""
        name = patch.written.name
        entry = self._entry(name)
        assert entry is not None
        for cut in self._cuts_of(patch):
            weight = read_cut(self.base, self.base.checkpoint.file(patch.source.file), cut)
            self._note(name, list(hash_units(self._digest(entry), cut.region, weight)))

    def _change(self, path: Path, cut: Cut) -> _Changed:
        """Read one cut, hash it, and add its delta; runs in a worker thread."""
        header, entry = cut.header, self._entry(cut.name)
        weight = read_cut(self.base, path, cut)
        units = list(hash_units(self._digest(entry), cut.region, weight)) if entry else []
        if entry is None or not self._touched(cut.name):
            if not is_finite(weight):
                raise self._not_finite(path, header)
            return _Changed(weight, 0.0, units)
        if self.requantize and cut.scale is not None:
            return self._requantized(path, cut, entry, weight, units)
        moved, changes, bases = 0.0, 0.0, 0.0
        for view, total in self.deltas.add(self._changed_as(entry), weight, cut.region):
            old = view.to(torch.float32, copy=True)  # a float32 file's would be the view itself
            difference = view.copy_(total).float() - old
            largest = float(torch.linalg.vector_norm(difference, math.inf))
            if not is_finite(old):
                raise self._not_finite(path, header)
            if not math.isfinite(largest):
                raise self._overflow(header)
            if not cut.added:
                moved = max(moved, largest)
                changes += float(torch.linalg.vector_norm(difference)) ** 2
                bases += float(torch.linalg.vector_norm(old)) ** 2
        return _Changed(weight, moved, units, squares=(changes, bases))

    def _requantized(
        self, path: Path, cut: Cut, entry: Entry, weight: Tensor, units: list[tuple[int, bytes]]
    ) -> _Changed:
        """A changed weight in block FP8."""
        quantized = self.base.quantization
        assert quantized is not None
        assert quantized.block is not None
        assert cut.scale is not None
        if not is_finite(weight):
            raise self._not_finite(path, cut.header)
        dtype = DTYPES[cut.scale.dtype]
        fp8 = requantize(self.deltas, entry.name, weight, cut.region, quantized.block, dtype)
        if not math.isfinite(fp8.moved):
            raise self._overflow(cut.header)
        squares = float(fp8.sums[2]), float(weight.double().square().sum())
        return _Changed(fp8.weight, fp8.moved, units, fp8, squares)

    def _overflow(self, header: Header) -> NumericError:
        return NumericError(
            "QC-MERGE-003",
            "is not finite after the merge",
            file=self.adapter.path,
            field=header.name,
            fix="train again with a lower learning_rate",
        )

    def _not_finite(self, path: Path, header: Header) -> NumericError:
        return NumericError(
            "QC-LOAD-003",
            "holds a value that is not finite",
            file=path,
            field=header.name,
            fix="download the checkpoint again",
        )

    def _book(self, patch: TensorPatch, moved: float) -> None:
        """Count a tensor that was changed."""
        name = patch.written.name
        entry = self._entry(name)
        assert entry is not None
        self.done.add(entry.name)
        self.largest = max(self.largest, moved)
        if moved or patch.added:
            self.moved.add(entry.name)
            self.changed += 1
            self.parameters += patch.written.numel
        else:
            self.unchanged.append(name)

    def _digest(self, entry: Entry) -> TensorDigest:
        """The digest of a tensor of which not every unit has been read yet."""
        digest = self._open.get(entry.name)
        # Two threads may both create it: setdefault keeps the first.
        return digest or self._open.setdefault(entry.name, TensorDigest(self._stored(entry)))

    def _stored(self, entry: Entry) -> Entry:
        return self.base.layout.located[entry.name].stored

    def _note(self, name: str, units: list[tuple[int, bytes]]) -> None:
        """Add digests of units; compare a complete tensor with what the adapter recorded."""
        entry = self._entry(name)
        if entry is None:
            return
        digest = self._digest(entry)
        for number, sha256 in units:
            digest.put(number, sha256)
        whole = digest.hex
        if whole is None:
            return
        del self._open[entry.name]
        self.digests[entry.name] = whole
        recorded = self.adapter.meta.get("tensors", {}).get(entry.name)
        if entry.part.name in self._incomparable and self._carries(name):
            return
        if recorded is not None and recorded != whole:
            raise self._other_base(name, f"sha256 {whole[:12]}", f"{recorded[:12]}")

    def _other_base(self, field: str, found: str, expected: str) -> InputError:
        return InputError(
            "QC-MERGE-001",
            "is not the base that the adapter was trained on",
            file=self.base.checkpoint.path,
            field=field,
            found=found,
            expected=expected,
            fix=f"name {self.adapter.meta.get('model', {}).get('source', 'its base')}",
        )

    def check(self) -> None:
        """Check that every pair was used, a tensor changed, and the base is the recorded one."""
        unused = self.adapter.changes.keys() - self.done
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
                found=f"{len(self.adapter.changes)} changes, largest 0",
                fix="train longer, or with a higher learning_rate",
            )
        now = fingerprints(self.base.layout, self.digests)
        for part, recorded in self.adapter.fingerprints.items():
            if part in self._incomparable and self.adapter.meta.get("tensors"):
                continue  # `_note` has compared each tensor that can be read
            if now.get(part) != recorded:
                raise self._other_base(f"part '{part}'", str(now.get(part))[:12], recorded[:12])
