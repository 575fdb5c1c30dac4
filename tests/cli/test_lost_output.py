"""The log is not the run: readers that leave, full disks and closed descriptors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.conversations import conversations, write_rows
from support.e2e_kit import tiny_folder
from support.process_kit import CLOSED, Process, forked, held, reader_that_leaves, wait_for
from support.run_kit import SHORT, words
from support.tiers import fast

from qcore.io.artifact import verify
from qcore.training.step import Loop

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS: dict[str, Any] = SHORT | {"max_steps": 3, "learning_rate": 5e-3, "save_steps": 0}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", conversations(8))


@pytest.fixture
def full() -> Iterator[int]:
    fd = os.open("/dev/full", os.O_WRONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def left() -> Iterator[int]:
    fd = reader_that_leaves()
    yield fd
    os.close(fd)


@pytest.fixture
def run(rows: Path, tmp_path: Path) -> Callable[..., Process]:
    """``qcore train`` into ``out``."""

    def start(*more: object, settings: dict[str, Any] = SETTINGS, **how: Any) -> Process:
        line = words(tiny_folder(), rows, tmp_path / "out", settings)
        return forked(tmp_path, *line, *more, **how)

    return start


def notes(folder: Path) -> list[str]:
    """Notes among the rows of ``metrics.jsonl``."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["note"] for row in lines if "note" in row]


LOST = {"left": "Broken pipe", "full": "No space left on device", "closed": "Bad file descriptor"}


@pytest.mark.parametrize("how", fast(LOST))
def test_a_run_whose_output_is_lost_goes_on(
    run: Callable[..., Process], request: pytest.FixtureRequest, tmp_path: Path, how: str
) -> None:
    fd = CLOSED if how == "closed" else request.getfixturevalue(how)
    process = run(out=fd, err=fd)
    assert process.status() == 0
    assert verify(tmp_path / "out").ok
    (note,) = notes(tmp_path / "out")
    assert note == f"progress is off: standard error cannot be written ({LOST[how]})"


@pytest.mark.slow
def test_a_summary_that_is_lost_does_not_fail_the_run(
    run: Callable[..., Process], full: int, tmp_path: Path
) -> None:
    process = run(out=full)
    assert process.status() == 0
    assert verify(tmp_path / "out").ok
    assert notes(tmp_path / "out") == []


def test_a_run_whose_json_reader_leaves_stops_with_a_checkpoint(
    run: Callable[..., Process], tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    mark = tmp_path / "mark"
    process = run(
        "--json", out=writer, before=lambda: held(Loop, "step", mark, at=2, seconds=0.5)
    )  # fmt: skip
    os.close(writer)
    wait_for(mark, process)
    os.close(reader)
    assert process.status() == 75
    assert verify(tmp_path / "out.run" / "checkpoint-2").ok
    *_, error = process.lines()
    assert error.startswith(
        "error[QC-TRAIN-006] "
        f"{tmp_path}/out.run/checkpoint-2: stopped by a closed standard output after step 2 of 3"
    )


@pytest.mark.slow
def test_json_that_cannot_be_written_is_an_error_and_the_adapter_stands(
    run: Callable[..., Process], full: int, tmp_path: Path
) -> None:
    process = run("--json", out=full)
    assert process.status() == 73
    assert verify(tmp_path / "out").ok
    *_, error = process.lines()
    assert error.startswith("error[QC-CLI-007] standard output: cannot be written")
    assert "files that the command has published are complete" in error


# -- errors keep their status


@pytest.mark.parametrize("json_too", [False, True])
@pytest.mark.parametrize("how", LOST)
def test_an_error_keeps_its_status(
    request: pytest.FixtureRequest, tmp_path: Path, how: str, json_too: bool
) -> None:
    fd = CLOSED if how == "closed" else request.getfixturevalue(how)
    more = ("--json",) if json_too else ()
    process = forked(tmp_path, "inspect", tmp_path / "nothing", *more, out=fd, err=fd)
    assert process.status() == 65


def test_an_error_that_stdout_cannot_take_is_on_stderr(tmp_path: Path, full: int) -> None:
    process = forked(tmp_path, "inspect", tmp_path / "nothing", "--json", out=full)
    assert process.status() == 65
    (line,) = process.lines()
    assert line.startswith("error[QC-HUB-001] ")


def test_a_full_stderr_loses_no_result(tmp_path: Path, full: int) -> None:
    process = forked(tmp_path, "presets", "show", "quick", err=full)
    assert process.status() == 0
    assert process.out.read_text().startswith("# quick (core)")


def test_a_closed_stdout_is_an_error(tmp_path: Path) -> None:
    process = forked(tmp_path, "presets", "show", "quick", out=CLOSED)
    assert process.status() == 73
    (line,) = process.lines()
    assert line.startswith("error[QC-CLI-007] standard output: cannot be written: found Bad file")


def test_no_file_takes_the_number_of_a_closed_descriptor(tmp_path: Path) -> None:
    """Else what is printed would be written into it."""

    def look() -> None:
        import qcore.cli.main as cli

        real = cli._run

        def run(arguments: list[str]) -> int:
            with (tmp_path / "first").open("w") as first, (tmp_path / "second").open("w") as second:
                (tmp_path / "numbers").write_text(f"{first.fileno()} {second.fileno()}")
            return real(arguments)

        cli._run = run

    process = forked(tmp_path, "presets", "list", out=CLOSED, err=CLOSED, before=look)
    assert process.status() == 73
    assert min(map(int, (tmp_path / "numbers").read_text().split())) > 2


@pytest.mark.parametrize("verb", ["inspect", "plan"])
def test_a_reader_that_left_a_report(tmp_path: Path, left: int, verb: str) -> None:
    process = forked(tmp_path, verb, tiny_folder(), out=left)
    assert process.status() == 141
    assert not [line for line in process.lines() if line.startswith("error")]


@pytest.mark.slow
def test_a_merge_stands_and_its_status_says_what_was_lost(
    run: Callable[..., Process], left: int, full: int, tmp_path: Path
) -> None:
    assert run(settings=SETTINGS | {"max_steps": 1}).status() == 0
    line = ["merge", "--model", tiny_folder(), "--adapter", tmp_path / "out", "--output"]
    lost: dict[str, tuple[dict[str, Any], int]] = {
        "left": ({"out": left}, 141),
        "full": ({"out": full}, 73),
        "closed": ({"out": CLOSED}, 73),
        "both": ({"out": full, "err": full}, 73),
        "log": ({"err": full}, 0),
        "log-closed": ({"err": CLOSED}, 0),
    }
    for name, (how, status) in lost.items():
        for more in ((), ("--json",)):
            target = tmp_path / f"{name}{len(more)}"
            process = forked(tmp_path, *line, target, *more, **how)
            assert process.status() == status, (name, process.lines())
            assert verify(target).ok
            errors = [text for text in process.lines() if text.startswith("error")]
            assert [text[:18] for text in errors] == (
                ["error[QC-CLI-007] "] if status == 73 and "err" not in how else []
            )
    damaged = tmp_path / "out" / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for how in ({"out": full, "err": full}, {"out": left, "err": left}, {"out": CLOSED}):
        process = forked(tmp_path, *line, tmp_path / "never", "--json", **how)
        assert process.status() == 65
        assert not (tmp_path / "never").exists()
