"""The record of a failure keeps the error, and of several failures the cause is reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from qcore.errors import InputError, Interrupted, NumericError, PreflightError, QcoreError
from qcore.parallel.failure import Failure, Kind, cause, ended, read, vanished, without_echoes

WRONG = InputError("QC-DATA-001", "is wrong", file="rows", field="line 3", found=1, fix="mend it")
STOPPED = Interrupted("QC-TRAIN-006", "stopped by SIGTERM after step 3")
CONTACT = QcoreError("QC-PARALLEL-013", "the ranks lost their connection")
LATE = QcoreError("QC-PARALLEL-012", "does not arrive")


def of(
    rank: int, error: QcoreError, kind: Kind = "own", *, by: int | None = None, time: float = 1.0
) -> Failure:
    place = f"rank {rank} (host, GPU {rank})"
    by = rank if by is None else by
    return Failure(rank=rank, by=by, place=place, error=error, kind=kind, time=time)


@pytest.mark.parametrize(
    "error", [WRONG, STOPPED, PreflightError([WRONG, NumericError("QC-TRAIN-003", "is NaN")])]
)
def test_a_record_keeps_the_error(tmp_path: Path, error: QcoreError) -> None:
    of(1, error).write(tmp_path / "error.json")
    found = read(tmp_path / "error.json")
    assert found is not None
    assert type(found.error) is type(error)
    assert found.error.as_json() == error.as_json()
    assert found.error.exit_code == error.exit_code
    assert [*tmp_path.iterdir()] == [tmp_path / "error.json"]


def test_a_record_is_an_error_file_of_torch(tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    of(1, WRONG, time=12.7).write(file)
    shown = ProcessFailure(local_rank=1, pid=1, exitcode=65, error_file=str(file))
    assert shown.timestamp == 12
    expected = "rank 1 (host, GPU 1): rows: line 3: is wrong: found 1"
    assert json.loads(json.dumps(shown.message))["message"] == expected


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"message": "of torch"}'])
def test_a_file_that_is_no_record_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "error.json").write_text(content)
    assert read(tmp_path / "error.json") is None
    assert read(tmp_path / "absent.json") is None


def test_the_error_of_one_rank_names_it() -> None:
    contact = of(0, CONTACT, "contact", time=0.5)
    error = cause([contact, of(1, WRONG)])
    assert isinstance(error, InputError)
    assert error.message == "rank 1 (host, GPU 1): rows: line 3: is wrong: found 1"
    several = cause([of(1, PreflightError([WRONG, WRONG]))])
    assert isinstance(several, PreflightError)
    assert all(each.message.startswith("rank 1 (host, GPU 1): ") for each in several.errors)


def test_an_error_that_several_ranks_raise_names_none() -> None:
    assert cause([of(2, WRONG), of(1, WRONG), of(0, CONTACT, "contact")]).message == WRONG.message
    assert cause([of(0, WRONG), of(1, CONTACT, "contact")]).message == WRONG.message
    defect = QcoreError("QC-INTERNAL-001", "KeyError: 1")
    assert cause([of(0, defect)]).message.startswith("rank 0 (host, GPU 0): ")


def test_a_signal_is_the_cause_only_if_nothing_else_is() -> None:
    killed = ended(1, "rank 1 (host)", -9)
    assert cause([of(0, STOPPED), of(1, STOPPED)], stopping=True) == STOPPED
    assert cause([of(0, STOPPED), killed], stopping=True) == STOPPED
    assert cause([of(0, STOPPED), of(1, WRONG, time=5.0)], stopping=True).code == "QC-DATA-001"
    # torchrun sends SIGTERM to the ranks that remain.
    assert cause([of(0, STOPPED), killed]).code == "QC-PARALLEL-011"


def test_a_late_rank_is_the_cause_though_it_was_killed() -> None:
    late = of(1, LATE, "hang", by=0)
    assert cause([ended(1, "rank 1 (host)", -9), late]).code == "QC-PARALLEL-012"


def test_how_a_process_ended() -> None:
    assert "was ended by SIGKILL; the system kills" in ended(1, "rank 1", -9).error.message
    assert ended(1, "rank 1", -11).named().message == "rank 1: was ended by SIGSEGV"
    assert ended(1, "rank 1", 3).error.message == "ended with status 3 and no error"


def test_the_account_of_others_gives_way_to_a_rank_that_left_its_own() -> None:
    own = of(1, WRONG)
    assert without_echoes([vanished(1, "rank 1", 0), own]) == [own]
