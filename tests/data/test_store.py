"""The token store: what is written is read again, one sample at a time, and checked."""

from __future__ import annotations

import hashlib
import os
import random
import resource
from array import array
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest
from support.swatch_kit import SwatchReader

from qcore.api.media import Payload
from qcore.data.rendering.masking import Example
from qcore.data.sources.row_bytes import RowBytes
from qcore.data.store.records import payload_json, payload_of
from qcore.data.store.samples import Samples
from qcore.data.store.write import AnonymousStore, store_of
from qcore.errors import InputError


def example(row: int, tokens: int, *, sample: int = 1, seed: int = 0, **more: object) -> Example:
    draw = random.Random(f"{row} {tokens} {sample} {seed}")
    ids = array("i", (draw.randrange(250_000) for _ in range(tokens)))
    labels = array("i", (id_ if draw.random() < 0.5 else -100 for id_ in ids))
    return Example(
        ids=ids, labels=labels, line=row, turns=2, row=row, sample=sample, reasoned=1,
        supervised=tokens - 1 - labels[1:].count(-100), **more,
    )  # fmt: skip


def mixed() -> list[Example]:
    sizes = [(1, 5), (1, 8), (2, 1), (3, 64), (3, 65), (3, 7), (4, 2049)]
    return [
        example(row, tokens, sample=at, variables='{"a": 1}' if row == 3 else "")
        for at, (row, tokens) in enumerate(sizes, 1)
    ]


def test_samples_are_read_as_they_were_written() -> None:
    given = mixed()
    samples = store_of(given).samples()
    assert list(samples) == given == [samples[n] for n in range(len(given))]
    assert samples == given
    assert samples != given[:-1]
    assert (samples[-1], samples[2:5]) == (given[-1], given[2:5])
    assert isinstance(samples[2:5], Samples)
    assert all(isinstance(one.ids, array) and one.ids.itemsize == 4 for one in samples)
    with pytest.raises(IndexError):
        samples[len(given)]


def test_columns_are_those_of_the_samples() -> None:
    given = mixed()
    samples = store_of(given).samples()
    assert list(samples.lengths) == [len(one.ids) for one in given]
    assert type(samples.lengths[0]) is int
    assert samples.sizes == (2, 1, 3, 1)
    assert list(samples.units) == []
    some = samples[1:6]
    assert (list(some.lengths), some.sizes) == ([8, 1, 64, 65, 7], (1, 1, 3))
    assert samples[::-1].sizes == (1, 3, 1, 2)


def test_rows_without_a_number_are_rows_of_their_own() -> None:
    assert store_of([example(0, 4), example(0, 5)]).samples().sizes == (1, 1)


def test_an_empty_store() -> None:
    samples = store_of([]).samples()
    assert (len(samples), list(samples), samples.sizes, list(samples.lengths)) == (0, [], (), [])
    assert samples == ()


def test_the_digest_binds_tokens_labels_order_and_grouping() -> None:
    given = mixed()
    digest = store_of(given).samples().digest()
    assert digest == store_of(mixed()).samples().digest()
    other = [*given]
    labels = array("i", given[3].labels)
    at = next(n for n, label in enumerate(labels) if label == -100)
    labels[at] = given[3].ids[at]
    other[3] = Example(
        ids=given[3].ids, labels=labels, line=3, turns=2, row=3, sample=4, supervised=1
    )
    regrouped = [*given[:1], example(9, 8, sample=2), *given[2:]]
    for changed in (other, given[::-1], given[:-1], regrouped):
        assert store_of(changed).samples().digest() != digest
    # Where a sample comes from is not part of it.
    moved = [
        Example(ids=e.ids, labels=e.labels, line=7, turns=1, supervised=1, row=e.row + 5)
        for e in given
    ]
    assert store_of(moved).samples().digest() == digest


def swatches(folder: Path) -> tuple[SwatchReader, list[Example]]:
    """A row of text, then two samples of a row with two swatches, of a file and of a data URL."""
    reader = SwatchReader()
    (folder / "a.txt").write_text("3 5 7")
    rows = folder / "rows.jsonl"
    rows.write_text('{"at": "data:text/plain;base64,OCA5"}\n')  # 8 9
    file = Payload(kind="swatch", sha256="a" * 64, path=folder / "a.txt", options={"shade": "red"})
    held = Payload(
        kind="swatch", sha256=sha256(b"8 9"), data=b"8 9", origin=RowBytes(rows, 1), options={}
    )
    media = [reader.read(file), reader.read(held)]
    payloads = (file, held.without_data())
    given = [example(1, 9)]
    for sample, count in ((1, 1), (2, 2)):
        ids = array("i", range(20))
        placed = reader.place(ids, media[:count])
        given.append(
            example(2, 20, sample=sample, media=tuple(media[:count]), placed=placed,
                    payloads=payloads[:count])
        )  # fmt: skip
    return reader, given


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_media_are_read_again_from_their_source(tmp_path: Path) -> None:
    reader, given = swatches(tmp_path)
    store = AnonymousStore()
    with store.writer() as out:
        out.extend(given)
    assert list(out.paths) == [tmp_path / "a.txt"]
    samples = store.open(reader).samples()
    assert list(samples) == given
    assert [one.payloads for one in samples] == [one.payloads for one in given]
    assert list(samples.units) == [0, 12, 20]
    before = len(reader.payloads)
    ((row, media),) = samples.with_media()
    assert (row, [(one.kind, one.tokens, one.units) for one in media]) == (
        2, [("swatch", 3, 12), ("swatch", 2, 8)],
    )  # fmt: skip
    assert len(reader.payloads) == before  # no medium is read for its digest


def test_a_medium_that_changed_is_an_error(tmp_path: Path) -> None:
    reader, given = swatches(tmp_path)
    samples = store_of(given, reader).samples()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="changed after its row was read"):
        samples[2]


def test_bytes_that_cannot_be_read_again_are_held() -> None:
    payload = Payload(kind="swatch", sha256="b" * 64, data=b"8 9", options={}).without_data()
    assert payload_json(payload) is None


def test_payloads_as_json(tmp_path: Path) -> None:
    frame = Payload(kind="film", sha256="c" * 64, path=tmp_path / "f.png", options={})
    row = Payload(
        kind="film", sha256="d" * 64, origin=RowBytes(tmp_path / "r.jsonl", 7), options={"fps": 2.5}
    )
    for payload in (
        frame, row,
        Payload(kind="film", sha256="e" * 64, frames=(frame, row), options={"max": None}),
    ):  # fmt: skip
        assert payload_of(payload_json(payload)) == payload
    odd = Payload(kind="film", sha256="f" * 64, path=tmp_path, options={"at": (1, 2)})
    assert payload_json(odd) is None


def test_memory_does_not_grow_with_the_samples() -> None:
    """4,000 samples of 4,096 tokens are 131 MB of ids and labels."""

    def many() -> Iterator[Example]:
        ids = array("i", range(4096))
        for row in range(1, 4001):
            yield Example(ids=ids, labels=ids, line=row, turns=1, supervised=4095, row=row)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    samples = store_of(many()).samples()
    assert sum(map(len, (one.ids for one in samples))) == 4096 * 4000
    assert len(samples.sizes) == 4000
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 30 * 1024  # KiB


def test_open_files_are_closed_with_the_store() -> None:
    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = files()
    samples = store_of(mixed()).samples()
    assert files() > before
    del samples
    assert files() == before


def test_rows_are_grouped_as_groupby_does() -> None:
    draw = random.Random(5)
    rows = sorted(draw.randrange(1, 40) for _ in range(100))
    given = [example(row, draw.randrange(1, 30), sample=n) for n, row in enumerate(rows)]
    wanted = tuple(len(list(some)) for _, some in groupby(rows))
    assert store_of(given).samples().sizes == wanted
