"""Which weights get LoRA, and with which numbers: groups, their ranks, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qcore.adapter.targets import targets
from qcore.checkpoint.layout import Layout
from qcore.errors import UsageError
from qcore.nn.qlora.lora_layer import Lora
from qcore.plugins.resolve_model import identify
from qcore_qwen35.tiny import write

LORA = Lora(r=8, lora_alpha=16)
#: Maps of the tiny mixture of experts, counted by hand: three delta layers, one of attention.
MAPS = {
    "attn": 4, "gdn": 3 * 3, "experts": 4 * 2, "shared_expert": 4 * 3,
    "gdn_gates": 3 * 2, "router": 4 * 2,
}  # fmt: skip
ON = ("attn", "gdn", "experts", "shared_expert")


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    folder = tmp_path_factory.mktemp("targets") / "base"
    write(folder, moe=True)
    return identify(str(folder)).layout


def numbers(layout: Layout, *asked: str, lora: Lora = LORA, **more: Any) -> dict[str, set[Lora]]:
    """The numbers of each group's maps; each group must be hit whole."""
    chosen = targets(layout, asked, lora, **more)
    found: dict[str, list[Lora]] = {}
    for name, lora in chosen.items():
        assert layout.table[name].part.name == "text"  # never of the prediction layer
        found.setdefault(layout.table[name].row.group, []).append(lora)
    assert {group: len(values) for group, values in found.items()} == {g: MAPS[g] for g in found}
    return {group: set(values) for group, values in found.items()}


def refused(layout: Layout, *asked: str, lora: Lora = LORA, **more: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        targets(layout, asked, lora, **more)
    assert caught.value.exit_code == 2
    assert caught.value.fix
    assert "\n" not in caught.value.message
    return caught.value


def test_groups_that_are_on_without_being_asked(layout: Layout):
    assert numbers(layout) == {group: {LORA} for group in ON}


@pytest.mark.parametrize("group", MAPS)
def test_a_group_that_is_asked_is_hit_alone(layout: Layout, group: str):
    assert numbers(layout, group) == {group: {LORA}}


def test_all_of_them(layout: Layout):
    assert numbers(layout, *MAPS) == {group: {LORA} for group in MAPS}
    assert numbers(layout, "attn", "attn") == {"attn": {LORA}}


def test_order_is_that_of_the_table(layout: Layout):
    chosen = targets(layout, ["router", "attn"], LORA)
    assert list(chosen) == [entry.name for entry in layout.table if entry.name in chosen]


def test_a_group_has_its_own_rank_and_alpha(layout: Layout):
    found = numbers(layout, group_r={"experts": 2, "attn": 64}, group_lora_alpha={"experts": 3})
    assert found["experts"] == {Lora(r=2, lora_alpha=3)}
    assert found["attn"] == {Lora(r=64, lora_alpha=16)}
    assert found["gdn"] == found["shared_expert"] == {LORA}


def test_other_numbers_stay(layout: Layout):
    lora = Lora(r=8, lora_alpha=16, lora_dropout=0.1, use_rslora=True)
    found = numbers(layout, "attn", lora=lora, group_r={"attn": 4})
    assert found == {"attn": {Lora(r=4, lora_alpha=16, lora_dropout=0.1, use_rslora=True)}}


def test_nothing_for_groups_is_as_no_groups(layout: Layout):
    assert numbers(layout, group_r={}, group_lora_alpha={}) == numbers(layout)


@pytest.mark.parametrize("field", ["group_r", "group_lora_alpha"])
def test_numbers_of_a_group_that_is_not_trained(layout: Layout, field: str):
    for group, asked in (
        ("router", ()),  # a group of the model, that is not on
        ("experts", ("attn", "gdn")),  # one that is on, and is not asked
        ("mtp", ()),  # one that is never trained
        ("norm", ()),  # one that is none of LoRA's
        ("nothing", ()),
    ):
        error = refused(layout, *asked, **{field: {group: 4}})
        assert (error.code, error.field, error.found) == ("QC-LORA-001", field, group)
        assert "is not a LoRA group of this run" in error.message
        assert group not in (error.expected or "")
    assert "attn, gdn" in (refused(layout, "attn", "gdn", **{field: {"x": 4}}).expected or "")


@pytest.mark.parametrize("group", ["mtp", "norm", "embed", "head", "nothing", ""])
def test_a_group_that_cannot_be_asked(layout: Layout, group: str):
    error = refused(layout, "attn", group)
    assert (error.code, error.field, error.found) == ("QC-LORA-001", "target_groups", group)
    assert error.expected == "attn, gdn, experts, shared_expert, gdn_gates, router"


@pytest.mark.parametrize("asked", [(), ("experts",), ("attn", "router")], ids=str)
def test_dropout_does_not_go_with_what_peft_drops_no_input_of(
    layout: Layout, asked: tuple[str, ...]
):
    error = refused(layout, *asked, lora=Lora(r=8, lora_alpha=16, lora_dropout=0.05))
    assert (error.code, error.field, error.found) == ("QC-LORA-003", "lora_dropout", 0.05)
    group = "router" if "router" in asked else "experts"
    assert f"'{group}'" in error.message
    assert "lora_dropout=0" in (error.fix or "")


def test_dropout_on_maps_of_modules_alone(layout: Layout):
    lora = Lora(r=8, lora_alpha=16, lora_dropout=0.05)
    asked = ("attn", "gdn", "shared_expert")
    assert numbers(layout, *asked, lora=lora) == {group: {lora} for group in asked}


def test_a_group_without_a_map_in_this_model(tmp_path: Path):
    write(tmp_path / "base", layer_types=["linear_attention"] * 4)
    layout = identify(str(tmp_path / "base")).layout
    error = refused(layout, "attn", "mlp")
    assert (error.code, error.found) == ("QC-LORA-002", "attn")
