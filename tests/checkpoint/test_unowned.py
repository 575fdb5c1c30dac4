"""Tensors that no part owns: carried by whole subtrees, else strays."""

from __future__ import annotations

from typing import Any

import pytest

from qcore.api.parameters import Part, Row, Table
from qcore.checkpoint.safetensors_header import Header
from qcore.checkpoint.unowned import carried_and_strays, unclaimed_sections

TEXT = Part(
    name="text",
    owner="test",
    section="text_config",
    dims={"a": 1},
    rows=(Row("model.text.w", "a", "embed"), Row("model.text.v", "a", "embed")),
)
TABLE = Table([TEXT])


def split(names: list[str], config: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    headers = [Header(name, "F32", (1,), "a", 0, 4) for name in names]
    spaces = {"text": TEXT.namespaces[0]}
    carried, strays = carried_and_strays(headers, TABLE, spaces, config)
    return {header.name: home for header, home in carried.items()}, [h.name for h in strays]


def test_sections_that_no_part_claims() -> None:
    config = {
        "text_config": {}, "vision_config": {}, "audio_config": None, "quantization_config": {},
        "model_type": "x",
    }  # fmt: skip
    assert unclaimed_sections(config, TABLE) == ["vision_config"]


@pytest.mark.parametrize("sections", [0, 1, 2])
def test_as_many_subtrees_as_unclaimed_sections_the_largest_first(sections: int) -> None:
    config = {f"{n}_config": {} for n in range(sections)}
    names = ["model.text.x", "model.tower.a", "model.tower.b", "stray.c"]
    tower = {"model.tower.a": "model.tower", "model.tower.b": "model.tower"}
    carried, strays = split(names, config)
    assert carried == [{}, tower, {**tower, "stray.c": "stray"}][sections]
    assert set(strays) == set(names) - carried.keys()
    assert strays[0] == "model.text.x", "below a root it is never carried"
