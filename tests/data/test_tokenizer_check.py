"""Whether a tokenizer fits a model is asked in one place, by preflight and by the mask's proof."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcore.data.rendering.tokenizer_check import id_beyond, unknown_tokens

IDS = {"a": 0, "<end>": 5, "b": 4}
CORE = Path(__file__).parents[2] / "core/src/qcore"


@pytest.mark.parametrize("rows", [0, 4, 5])
def test_the_largest_id_beyond_the_embedding(rows: int) -> None:
    error = id_beyond(IDS, rows, Path("base"))
    assert error is not None
    assert (error.code, error.exit_code, error.field) == ("QC-PRE-002", 65, "'<end>'")
    assert (error.file, error.found) == (str(Path("base/tokenizer.json")), 5)
    assert str(rows) in error.message


def test_ids_within_the_embedding() -> None:
    assert id_beyond(IDS, 6, Path("base")) is None
    assert id_beyond({}, 0, Path("base")) is None


def test_unknown_tokens_are_named_once_and_in_order() -> None:
    errors = list(unknown_tokens(("<x>", "a", "<y>", "<x>"), IDS.get, purpose="for a test"))
    assert [error.field for error in errors] == ["'<x>'", "'<y>'"]
    assert {error.code for error in errors} == {"QC-PRE-003"}
    assert errors[0].message == (
        "tokenizer.json: '<x>': is not in the tokenizer: expected one token, for a test"
    )


@pytest.mark.parametrize("code", ["QC-PRE-001", "QC-PRE-002", "QC-PRE-003"])
def test_each_is_raised_in_one_place(code: str) -> None:
    places = [path for path in CORE.rglob("*.py") if f'"{code}"' in path.read_text("utf-8")]
    assert len(places) == 1
