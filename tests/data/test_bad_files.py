"""Bad data files: each is refused by file, line, field and fix, in bounded time."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.bad_files import BAD, Bad

from qcore.api.media import RowError
from qcore.data.sources.containers import records
from qcore.data.sources.read import read_sources
from qcore.errors import PreflightError, QcoreError, raise_all

SECONDS = 20
PER_GROUP = 3  # cases of each group that run in the fast tier


def sampled() -> Iterator[object]:
    seen: dict[str, int] = {}
    for name, bad in BAD.items():
        group = name.partition(":")[0]
        seen[group] = seen.get(group, 0) + 1
        marks = () if seen[group] <= PER_GROUP else (pytest.mark.slow,)
        yield pytest.param(bad, id=name, marks=marks)


@contextmanager
def bounded() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise AssertionError(f"takes more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def as_unprivileged_user(lower: bool) -> Iterator[None]:
    """Give up root's right to read everything, where a case is about permissions."""
    root = lower and os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def error_of(word: str) -> QcoreError:
    """The error that a user sees, as training would collect it."""
    with bounded(), pytest.raises(QcoreError) as caught:
        read(word)
    return caught.value


def read(word: str) -> None:
    problems: list[QcoreError] = []
    for source in read_sources([word]):
        for record in records(source):
            if isinstance(record.value, RowError):
                problems.append(record.value.error(record.path, record.line, record.unit))
    raise_all(problems)


@pytest.mark.parametrize("bad", list(sampled()))
def test_it_is_refused(bad: Bad, tmp_path: Path) -> None:
    word = bad.make(tmp_path)
    with as_unprivileged_user("Permission" in bad.words):
        error = error_of(word)
    assert not isinstance(error, PreflightError), [str(each) for each in error.errors]
    assert (error.code, bad.words in error.message) == (bad.code, True), error.message
    if bad.field is None:
        assert error.field is None or error.code.startswith("QC-YAML")
    else:
        assert (error.field or "").startswith(bad.field), error.field
    if bad.file != "-":
        assert Path(error.file or "").name == (bad.file or Path(word).name)
    assert error.fix or error.code.startswith("QC-YAML")
    assert "\n" not in error.message + (error.fix or "")
    assert len(error.message) < 700


def test_the_table_is_large_enough() -> None:
    assert len(BAD) >= 150
