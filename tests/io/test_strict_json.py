"""The one reader of JSON text that somebody else wrote."""

import json
import math
from pathlib import Path

import pytest

from qcore.io import strict_json

CORE = Path(__file__).parents[2] / "core/src/qcore"


@pytest.mark.parametrize("finite", [False, True])
@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '[{"b": {"a": 1, "c": 2, "a": 3}}]'])
def test_a_duplicate_key_is_refused_at_any_depth(text: str, finite: bool) -> None:
    with pytest.raises(strict_json.DuplicateKeyError, match="key 'a' stands twice") as caught:
        strict_json.loads(text, finite=finite)
    assert caught.value.key == "a"


@pytest.mark.parametrize(
    ("text", "overflow"), [("NaN", False), ("-Infinity", False), ("1e999", True)]
)
def test_numbers_that_are_not_finite(text: str, overflow: bool) -> None:
    assert not math.isfinite(strict_json.loads(text))
    with pytest.raises(strict_json.NonFiniteError) as caught:
        strict_json.loads(f'{{"a": [{text}]}}', finite=True)
    assert (caught.value.text, caught.value.overflow) == (text, overflow)


def test_what_is_not_json_says_where() -> None:
    with pytest.raises(json.JSONDecodeError) as caught:
        strict_json.loads('{"a": ')
    assert caught.value.pos == 6


def test_there_is_no_second_hook_for_duplicate_keys() -> None:
    """A document that somebody else wrote is read here and nowhere else."""
    hooks = [
        path.relative_to(CORE).as_posix()
        for path in CORE.rglob("*.py")
        if "object_pairs_hook" in path.read_text(encoding="utf-8")
    ]
    assert hooks == ["io/strict_json.py"]
