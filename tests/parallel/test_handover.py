"""Under torchrun the first rank speaks, and an exception of a collective is not its own error."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed import DistBackendError, HashStore

from qcore.errors import InputError, Interrupted, QcoreError
from qcore.parallel import handover, watch
from qcore.parallel.failure import Failure, read
from qcore.parallel.rank import ASKED
from qcore.parallel.watch import Peers

RESET = "[third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"


@pytest.fixture
def error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process is rank 0 of two that ``--gpus`` has started."""
    own = tmp_path / "0" / "error.json"
    for local in "01":
        (tmp_path / local).mkdir()
    told = {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "1",
        "TORCHELASTIC_ERROR_FILE": str(own), "QCORE_LAUNCHED": "1",
    }  # fmt: skip
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(handover, "_ALIKE", 0.1)
    monkeypatch.setattr(watch, "_UNKNOWN", 0.0)
    return own


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (RuntimeError(RESET), "contact"),
        (DistBackendError("NCCL error: remote process exited"), "contact"),
        (RuntimeError("shape mismatch"), "own"),
        (KeyError("gloo"), "own"),
    ],
)
def test_an_exception_of_a_collective(
    error_file: Path, monkeypatch: pytest.MonkeyPatch, reason: Exception, kind: str
) -> None:
    peers = Peers(HashStore(), 0, 2, "rank 0 (host)", timeout=60.0, end=lambda failure: None)
    monkeypatch.setattr(handover, "_peers", peers)
    defect = QcoreError("QC-INTERNAL-001", str(reason))
    defect.__cause__ = reason
    assert handover.of_error(defect).kind == kind


def test_the_launcher_speaks_for_a_rank_that_it_started(
    error_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "_handing", handover.threading.Lock())
    error = InputError("QC-DATA-001", "is wrong", file="rows")
    assert handover.hand_over(handover.of_error(error)) is None
    found = read(error_file)
    assert found is not None
    assert (found.rank, found.error.message) == (0, "rows: is wrong")


def test_a_signal_is_not_announced_once_a_rank_has_failed(error_file: Path) -> None:
    said: list[str] = []
    say = handover.quiet_in_failure(said.append)
    say("SIGTERM: finishing step 0")  # of torchrun: the launcher has received none
    (error_file.parent.parent / ASKED).touch()
    say("SIGTERM: finishing step 1")
    failed = Failure(rank=1, by=1, place="rank 1", error=InputError("QC-DATA-001", "is wrong"))
    failed.write(error_file.parent.parent / "1" / error_file.name)
    say("SIGTERM: finishing step 2")
    assert said == ["SIGTERM: finishing step 1"]


def test_last_words_are_left_to_the_launcher(error_file: Path) -> None:
    words = Interrupted("QC-TRAIN-006", "ended by a second Ctrl-C")
    handover.last_words(pytest.fail)(words)
    found = read(error_file)
    assert found is not None
    assert found.error.message == words.message
