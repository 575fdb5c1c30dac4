"""The contract of ``--json``: exit statuses, error codes, keys and types of every cheap case.

The contract stands in ``tests/goldens/shapes.json``; the codes of the cases that must fail were
taken from docs/errors.md by hand. What takes longer is compared by ``tests/goldens/compare.py``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from goldens.case import Case
from goldens.cases import CASES, CHEAP
from goldens.inputs import make_inputs
from goldens.rules import Rules
from goldens.shapes import SHAPES, contract
from support.cli_kit import here
from support.error_list import listed_codes
from support.tiers import fast

from qcore_qwen35.tiny import write

CHANGELOG = Path(__file__).resolve().parents[2] / "CHANGELOG.md"
GOLDEN: dict[str, Any] = json.loads(SHAPES.read_text(encoding="utf-8"))
RULES = Rules.load()


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the inputs of the cases."""
    folder = tmp_path_factory.mktemp("goldens")
    write(folder / "dense")
    write(folder / "moe", moe=True)
    make_inputs(folder / "dense", folder / "moe", folder / "scratch" / "inputs")
    return folder / "scratch"


@pytest.mark.parametrize("case", fast(CHEAP, *CHEAP[::3]), ids=lambda case: case.name)
def test_a_result_keeps_its_contract(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    scratch: Path,
    tmp_path: Path,
    case: Case,
) -> None:
    monkeypatch.chdir(scratch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in case.env.items():
        monkeypatch.setenv(name, value)
    if case.prepare is not None:
        case.prepare(scratch)
    ended = here(capsys, *case.words, "--json")
    assert contract(ended.json, ended.code, case.verb, RULES) == GOLDEN["cases"][case.name]


def test_every_case_has_a_contract_with_the_code_that_it_must_end_with() -> None:
    codes = {name: golden["code"] for name, golden in GOLDEN["cases"].items()}
    assert codes == {case.name: case.code or None for case in CASES}


def test_a_case_ends_with_the_exit_status_of_its_code() -> None:
    for name, golden in GOLDEN["cases"].items():
        status = GOLDEN["codes"][golden["code"]] if golden["code"] else 0
        assert golden["status"] == status, name


def removed_codes() -> dict[str, list[str]]:
    """Removed code -> its successors, as CHANGELOG.md lists them under ``Removed error codes``."""
    text = CHANGELOG.read_text(encoding="utf-8")
    sections = re.findall(
        r"^### Removed error codes\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL
    )
    removed = {}
    for line in re.findall(r"^- .*(?:\n  .*)*", "".join(sections), re.MULTILINE):
        first, *successors = re.findall(r"QC-[A-Z0-9]+-\d{3}", line)
        removed[first] = successors
    return removed


def test_an_error_code_keeps_its_exit_status() -> None:
    listed = listed_codes()
    kept = {code: status for code, status in GOLDEN["codes"].items() if code in listed}
    assert {code: listed[code] for code in kept} == kept


def test_a_removed_error_code_is_in_the_changelog_with_its_successor() -> None:
    listed, removed = listed_codes(), removed_codes()
    assert sorted(set(GOLDEN["codes"]) - set(listed)) == sorted(removed)
    for code, successors in removed.items():
        assert successors, f"{code} has no successor"
        assert set(successors) <= set(listed), f"{code}: {successors}"
