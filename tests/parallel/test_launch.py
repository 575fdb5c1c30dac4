"""Ranks that torchrun starts: one error, one answer to a signal, and no process is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from support.cli_kit import here
from support.e2e_kit import tiny_folder
from support.ranks_kit import Ranks, begin, begin_run
from support.run_kit import SHORT, words

from qcore.parallel import agent, handover, rank

LONG: dict[str, Any] = {"steps": 600, "seconds": 0.1}
TORCHRUN = ("--standalone", "--nproc-per-node", "2")


def saved(ranks: Ranks) -> list[int]:
    """The steps after which a checkpoint was written."""
    file = ranks.home / "saved"
    return [*map(int, file.read_text().split())] if file.exists() else []


# -- what is refused before anything starts


@pytest.mark.parametrize(
    ("gpus", "device", "expected"),
    [
        ("0", "cpu", "found 0, expected at least 1"),
        ("-2", "cpu", "found -2, expected at least 1"),
        ("4096", "cpu", "processes on the CPU"),
        ("4096", "auto", "the GPUs that are visible here"),
    ],
)
def test_a_number_that_is_not_possible(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, gpus: str, device: str, expected: str
) -> None:
    ended = here(
        capsys, "train", "--model", "m", "--data", "d", "--output", tmp_path / "out",
        "--device", device, "--gpus", gpus,
    )  # fmt: skip
    assert ended.code == 2
    assert expected in ended.error("QC-PARALLEL-010")
    assert not [*tmp_path.iterdir()]


def test_a_wrong_setting_is_refused_by_the_launcher(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(agent, "run_agent", pytest.fail)
    ended = here(
        capsys, "train", "--model", "m", "--data", "d", "--output", tmp_path / "out",
        "--gpus", "2", "--set", "lr=1",
    )  # fmt: skip
    ended.error("QC-CONFIG-001")


def test_gpus_inside_torchrun_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    ended = here(
        capsys, "train", "--model", "m", "--data", "d", "--output", tmp_path / "out", "--gpus", "2"
    )
    assert "torchrun has started the ranks" in ended.error("QC-PARALLEL-010")


def test_a_process_without_torchrun_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rank.seat() is None
    say = [].append
    assert handover.quiet_in_failure(say) is say
    assert handover.last_words(say) is say


# -- processes


@pytest.mark.slow
def test_the_result_is_printed_once(tmp_path: Path) -> None:
    ranks = begin(tmp_path, {}, "--json")
    assert ranks.status() == 0
    assert json.loads(ranks.out()) == {"steps": 3, "warnings": []}
    assert ranks.err() == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "code", "status", "text"),
    [
        ({"1": [[2, "sum", "error"]]}, "QC-DATA-001", 65, "): rows.jsonl: is wrong. Fix: mend it"),
        ({"1": [[2, "sum", "bug"]]}, "QC-INTERNAL-001", 1, "): ZeroDivisionError: here"),
        ({"1": [[2, "sum", "SIGKILL"]]}, "QC-PARALLEL-011", 1, "): was ended by SIGKILL"),
        ({"1": [[0, "prepare", "SIGKILL"]]}, "QC-PARALLEL-011", 1, "): was ended by SIGKILL"),
        ({"1": [[2, "sum", "hang"]], "timeout": 3}, "QC-PARALLEL-012", 1,
         "): does not arrive at the sum of step 2"),
        ({"1": [[2, "sum", "SIGSTOP"]], "timeout": 3}, "QC-PARALLEL-012", 1,
         "): does not arrive at the sum of step 2"),
    ],
)  # fmt: skip
def test_the_rank_that_fails_is_named_once(
    tmp_path: Path, plan: dict[str, Any], code: str, status: int, text: str
) -> None:
    ranks = begin(tmp_path, plan)
    assert ranks.status() == status
    line = ranks.error(code)
    assert line.startswith(f"error[{code}] rank 1 (")
    assert text in line
    assert len(ranks.lines()) == 1
    assert ranks.out() == ""


@pytest.mark.slow
def test_an_error_of_all_ranks_names_none(tmp_path: Path) -> None:
    wrong = [[0, "prepare", "error"]]
    ranks = begin(tmp_path, {"0": wrong, "1": wrong}, "--json")
    assert ranks.status() == 65
    assert json.loads(ranks.out())["error"]["message"] == "rows.jsonl: is wrong"
    assert ranks.err() == ""


@pytest.mark.slow
def test_a_checkpoint_is_finished_though_a_rank_is_killed(tmp_path: Path) -> None:
    plan = LONG | {"0": [[3, "save", "slow"]], "slow": 4.0}
    ranks = begin(tmp_path, plan)
    ranks.reached("at-0-3-step")
    ranks.kill(signal.SIGUSR1, rank=0)
    ranks.reached("at-0-3-save")
    ranks.kill(signal.SIGKILL, rank=1)
    assert ranks.status() == 1
    assert saved(ranks) == [3]
    assert "rank 1" in ranks.error("QC-PARALLEL-011")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "to"), [("SIGTERM", None), ("SIGHUP", None), ("SIGINT", 1)])
def test_a_signal_leads_to_one_checkpoint(tmp_path: Path, name: str, to: int | None) -> None:
    ranks = begin(tmp_path, LONG)
    ranks.reached("at-1-2-step")
    ranks.kill(getattr(signal, name), to)
    assert ranks.status() == 75
    assert len(saved(ranks)) == 1
    assert f"after step {saved(ranks)[0]}" in ranks.error("QC-TRAIN-006")
    assert len(ranks.lines()) == (2 if to is None else 1)  # what is being finished, and the error


@pytest.mark.slow
def test_sigusr1_saves_and_goes_on(tmp_path: Path) -> None:
    ranks = begin(tmp_path, {"steps": 30, "seconds": 0.1})
    ranks.reached("at-1-2-step")
    ranks.kill(signal.SIGUSR1)
    assert ranks.status() == 0
    assert len(saved(ranks)) == 1
    assert ranks.lines() == ["SIGUSR1: a checkpoint will be written, and the run goes on"]


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    ranks = begin(tmp_path, {"steps": 2, "seconds": 60})
    ranks.reached("at-1-1-step")
    ranks.reached("at-0-1-step")
    ranks.kill(signal.SIGINT)
    signal.sigtimedwait([], 0.8)
    ranks.kill(signal.SIGINT)
    assert ranks.status(timeout=20) == 75
    assert "second Ctrl-C" in ranks.error("QC-TRAIN-006")
    assert saved(ranks) == []


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_rank_behind(tmp_path: Path) -> None:
    ranks = begin(tmp_path, LONG)
    ranks.reached("at-1-2-step")
    ranks.kill(signal.SIGKILL)
    ranks.process.wait()
    for number in (0, 1):
        pid = ranks.pid(number)
        for _ in range(300):
            if not Path(f"/proc/{pid}").exists():
                break
            signal.sigtimedwait([], 0.1)
        else:
            os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"rank {number} still ran")
    assert len(saved(ranks)) == 1


@pytest.mark.slow
def test_torchrun_starts_the_ranks_again(tmp_path: Path) -> None:
    ranks = begin(
        tmp_path, {"1": [[2, "step", "once"]]}, "--auto-resume", env={"PET_MAX_RESTARTS": "2"}
    )
    assert ranks.status() == 0
    (line,) = ranks.lines()
    assert line.startswith("rank 1 (")
    assert line.endswith("; torchrun starts the ranks again")
    assert "3 steps" in ranks.out()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "code"), [("error", "QC-DATA-001"), ("SIGKILL", "QC-PARALLEL-011")]
)
def test_under_a_plain_torchrun_one_rank_speaks(tmp_path: Path, what: str, code: str) -> None:
    ranks = begin(tmp_path, {"1": [[2, "sum", what]]}, "--json", torchrun=TORCHRUN)
    assert ranks.status() == 1  # of torchrun
    error = json.loads(ranks.out())["error"]
    assert error["code"] == code
    assert error["message"].startswith("rank 1 (")


@pytest.mark.slow
def test_two_launchers_meet_as_torchrun_does(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        endpoint = f"localhost:{listener.getsockname()[1]}"
    env = {
        "PET_NNODES": "2", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": endpoint,
        "PET_RDZV_ID": "run", "HOME_OF_MARKS": str(tmp_path),
    }  # fmt: skip
    machines = [begin(tmp_path / name, LONG, "--json", gpus=1, env=env) for name in ("a", "b")]
    while not (tmp_path / "at-1-2-step").exists():
        assert machines[0].process.poll() is None, machines[0].err()
        signal.sigtimedwait([], 0.05)
    machines[1].kill(signal.SIGTERM)
    assert [machine.status() for machine in machines] == [75, 75]
    assert len((tmp_path / "saved").read_text().split()) == 1
    codes = [json.loads(machine.out())["error"]["code"] for machine in machines]
    assert codes == ["QC-TRAIN-006"] * 2


@pytest.mark.slow
def test_a_run_whose_rank_is_killed_goes_on(tmp_path: Path, rows: Path) -> None:
    settings = SHORT | {
        "max_steps": 20, "save_steps": 2, "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3, "publish_without_gain": True,
    }  # fmt: skip
    line = words(tiny_folder(), rows, tmp_path / "out", settings)
    ranks = begin_run(tmp_path, *line, "--gpus", 2, "--auto-resume")
    newest = tmp_path / "out.run" / "checkpoint-4"
    while not newest.exists():
        assert ranks.process.poll() is None, ranks.err()
        signal.sigtimedwait([], 0.01)
    ranks.kill(signal.SIGKILL, rank=1)
    assert ranks.status() == 1
    assert "rank 1 (" in ranks.error("QC-PARALLEL-011")
    again = begin_run(tmp_path, *line, "--gpus", 2, "--auto-resume", "--json")
    assert again.status() == 0, again.err()
    assert json.loads(again.out())["steps"] == 20
    steps = [json.loads(row) for row in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "loss" in row] == [*range(1, 21)]
    assert {row["ranks"] for row in steps if "loss" in row} == {2}
