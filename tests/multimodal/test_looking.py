"""A run that can only succeed by looking: it learns what pictures show, and from blanks nothing.

The pictures and the run are the benchmark's, in its small form: three colours and three shapes,
anywhere, on noise. Tower, merger and text are trained by the verb itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("transformers")
FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Any:
    """The benchmark's own modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import looking
        import looking_run

        yield looking, looking_run


@pytest.fixture(scope="module")
def outcome(bench: tuple[ModuleType, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Both runs and what they answer."""
    import torch

    folder = tmp_path_factory.mktemp("looking")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        torch.set_num_threads(1)
        seen = bench[1].run(folder / "run", bench[1].SMALL, device="cpu")
        torch.set_num_threads(threads)
    print(seen)  # noqa: T201
    return seen


@pytest.mark.slow
def test_it_learns_what_pictures_show(outcome: Any) -> None:
    assert sum(outcome.asked.values()) >= 90
    assert set(outcome.looking) == {"colour", "shape"}
    right = sum(outcome.looking[kind] * outcome.asked[kind] for kind in outcome.asked)
    assert right > 0.9 * sum(outcome.asked.values()), outcome
    assert min(outcome.looking.values()) > 0.8, outcome


@pytest.mark.slow
@pytest.mark.parametrize("side", ["shown_blanks", "blank"])
def test_without_a_picture_it_guesses(
    bench: tuple[ModuleType, ModuleType], outcome: Any, side: str
) -> None:
    """Chance and three deviations of so many guesses, which is far from what looking reaches."""
    choices = bench[1].SMALL.task.choices
    assert choices == {"colour": 3, "shape": 3}
    found = getattr(outcome, side)
    assert set(found) == set(choices)
    for name, share in found.items():
        most = bench[0].bound(outcome.asked[name], choices[name])
        assert most < 0.55
        assert share <= most, outcome


@pytest.mark.parametrize("form", ["SMALL", "LARGE"])
def test_text_and_sizes_tell_nothing(
    bench: tuple[ModuleType, ModuleType], tmp_path: Path, form: str
) -> None:
    """Each answer of a question is right equally often, and twins differ in what is seen alone."""
    task = getattr(bench[1], form).task
    asked = bench[0].write(tmp_path, task, 1, seed=3)
    for name, choices in task.choices.items():
        answers = [one.answer for one in asked if one.about == name]
        assert len(set(answers)) == choices
        assert {answers.count(answer) for answer in answers} == {len(answers) // choices}
    for one, twin in zip(asked, bench[0].blanked(asked), strict=True):
        with Image.open(one.picture) as picture, Image.open(twin.picture) as blank:
            assert picture.size == blank.size
            assert len(set(blank.get_flattened_data())) == 1
            assert picture.getextrema() != blank.getextrema()
    rows = [(tmp_path / side / "rows.jsonl").read_text() for side in ("seen", "blank")]
    assert rows[0] == rows[1]
    texts = {json.loads(row)["messages"][0]["content"][1]["text"] for row in rows[0].splitlines()}
    assert len(texts) == len(task.choices)


def test_another_seed_draws_other_pictures(
    bench: tuple[ModuleType, ModuleType], tmp_path: Path
) -> None:
    task = bench[1].SMALL.task
    sets = [
        {
            one.picture.read_bytes()
            for one in bench[0].write(tmp_path / str(seed), task, 4, seed=seed)
        }
        for seed in (1, 2)
    ]
    assert len(sets[0]) == len(sets[1]) == 36
    assert not sets[0] & sets[1]
