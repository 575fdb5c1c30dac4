"""``qcore doctor`` on several ranks: rates of links, and what differs between ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from support.cli_kit import here

from qcore.api.records import Severity
from qcore.errors import UsageError
from qcore.preflight.links import Rates, in_child, judged, kinds_in, parsed
from qcore.preflight.ranks import differences, files_of, need_ranks

#: The table of ``nvidia-smi topo -m`` on two H200, and on four L40S of two sockets.
NVLINK = """\
\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tPIX\t0-47\t0\t\tN/A
GPU1\tNV18\t X \tNODE\t0-47\t0\t\tN/A
NIC0\tPIX\tNODE\t X

Legend:

  X    = Self
"""
PCIE = """\
        GPU0    GPU1    GPU2    CPU Affinity
GPU0     X      PIX     SYS     0-31
GPU1    PIX      X      SYS     0-31
GPU2    SYS     SYS      X      32-63
"""
#: As measured on two H200: 435 MB, 1.41 ms; 800 MB, 1.53 ms.
MEASURED = Rates(ranks=2, nbytes=435_000_000, all_reduce=1.41e-3, all_gather=0.83e-3)


@pytest.mark.parametrize(("table", "kinds"), [(NVLINK, {"NV18"}), (PCIE, {"PIX", "SYS"})])
def test_links_are_those_between_gpus(table: str, kinds: set[str]) -> None:
    assert set(kinds_in(table)) == kinds


def test_rates_are_those_of_a_ring() -> None:
    assert MEASURED.reduce_rate == pytest.approx(435e6 / 1.41e-3)
    assert MEASURED.gather_rate == pytest.approx(435e6 / 2 / 0.83e-3)
    eight = Rates(ranks=8, nbytes=800, all_reduce=2.0, all_gather=1.0)
    assert (eight.reduce_rate, eight.gather_rate) == (700, 700)


def test_good_rates_are_a_note_and_slow_ones_a_warning() -> None:
    (note,) = judged(MEASURED, "NVIDIA H200")
    assert (note.code, note.severity) == ("QC-DOCTOR-006", Severity.NOTE)
    assert "all-reduce of 435 MB 1.41 ms (309 GB/s)" in note.what
    slow = Rates(ranks=2, nbytes=10**8, all_reduce=5e-3, all_gather=5e-3)
    _, warning = judged(slow, "NVIDIA H200")
    assert (warning.code, warning.severity) == ("QC-DOCTOR-007", Severity.WARNING)
    assert "pass --link 20 to qcore plan" in str(warning.fix)
    assert [each.code for each in judged(slow, "a GPU of no table")] == ["QC-DOCTOR-006"]
    (failed,) = judged("no answer within 120 s", "NVIDIA H200")
    assert (failed.code, failed.severity) == ("QC-DOCTOR-007", Severity.WARNING)


def test_a_child_prints_rates_after_whatever_torchrun_prints() -> None:
    assert parsed("a warning\n" + json.dumps(asdict(MEASURED)) + "\n") == MEASURED
    assert parsed("a warning\n{}\n[1]\n") is None


def test_a_rank_with_another_version_is_named() -> None:
    reports = [
        {"torch": "2.13.0", "peft": "1"},
        {"torch": "2.13.0", "peft": "1"},
        {"torch": "2.12"},
    ]
    torch, peft = differences(reports, ["a", "a", "b"])
    assert (torch.code, torch.severity, torch.field) == (
        "QC-DOCTOR-008",
        Severity.ERROR,
        "torch",
    )
    assert torch.what.endswith("rank 0 on a: 2.13.0; rank 2 on b: 2.12")
    assert peft.what.endswith("rank 0 on a: 1; rank 2 on b: missing")


def test_another_driver_is_a_warning_and_many_ranks_are_counted() -> None:
    reports = [{"driver": "1"}] + [{"driver": "2"}] * 8
    (finding,) = differences(reports, ["a"] + ["b"] * 8)
    assert finding.severity is Severity.WARNING
    assert finding.what.count("on b: 2") == 5
    assert finding.what.endswith("and 3 more ranks")


def test_files_are_compared_by_size_and_both_ends(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(3 << 20))
    assert files_of(one) == files_of(other)
    assert sorted(files_of(one)) == ["file model.safetensors", "file sub/config.json"]
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    (finding,) = differences([files_of(one), files_of(other)], ["a", "b"])
    assert finding.field == "file model.safetensors"
    missing = list(differences([files_of(one), files_of(tmp_path / "absent")], ["a", "b"]))
    assert "rank 1 on b: missing" in missing[-1].what


def test_a_folder_that_no_rank_has_is_an_error(tmp_path: Path) -> None:
    (finding,) = differences([files_of(tmp_path / "absent")] * 2, ["a", "b"])
    assert (finding.code, finding.severity) == ("QC-DOCTOR-008", Severity.ERROR)
    assert "missing on all ranks" in finding.what
    assert finding.fix


def test_files_need_other_ranks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    need_ranks(None)
    with pytest.raises(UsageError):
        need_ranks(tmp_path)
    ended = here(capsys, "doctor", "--model", tmp_path)
    assert ended.code == 2
    assert "QC-DOCTOR-009" in ended.err
    assert "torchrun" in ended.err


@pytest.mark.slow
def test_two_ranks_measure_in_a_child_process() -> None:
    rates = in_child(2, "cpu")
    assert isinstance(rates, Rates), rates
    assert (rates.ranks, rates.nbytes) == (2, 2**20)
    assert rates.all_reduce > 0
    assert rates.all_gather > 0


def test_a_child_that_does_not_answer_is_killed() -> None:
    assert in_child(2, "cpu", limit=0.2) == "no answer within 0 s"


@pytest.mark.slow
def test_rank_0_reports_what_another_rank_lacks(tmp_path: Path) -> None:
    """Each rank has a folder of its own, as machines do; rank 1 has another config.json."""
    script = tmp_path / "doctor.py"
    script.write_text(
        "import os, sys\n"
        "from qcore.cli.main import main\n"
        "here = os.path.dirname(__file__) + '/rank' + os.environ['RANK']\n"
        "sys.argv = ['qcore', 'doctor', '--json', '--model', here]\n"
        "main()\n"
    )
    for rank in (0, 1):
        (tmp_path / f"rank{rank}").mkdir()
        (tmp_path / f"rank{rank}" / "config.json").write_text("{}" if rank else "{ }")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(script)],
        capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )  # fmt: skip
    assert done.returncode != 0
    (line,) = (each for each in done.stdout.splitlines() if each.startswith("{"))
    report = json.loads(line)
    assert not report["ok"]
    (different,) = (row for row in report["findings"] if row["code"] == "QC-DOCTOR-008")
    assert different["subject"] == "file config.json"
    assert "rank 1 on " in different["what"]
    (rates,) = (row for row in report["findings"] if row["code"] == "QC-DOCTOR-006")
    assert rates["what"].startswith("2 ranks: all-reduce of 1 MB")
