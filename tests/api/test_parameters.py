"""The algebra of the parameter table: regions tile, names expand, contradictions are errors."""

from __future__ import annotations

import random

import pytest
import torch

from qcore.api.parameters import (
    EXPERTS,
    FP32,
    LINEAR,
    NF4,
    PARAMETER,
    Aim,
    Kind,
    Namespace,
    Part,
    Row,
    Spelling,
    Table,
    at,
    cat,
    stack,
)
from qcore.errors import InputError, PluginError


def part(*rows: Row, name: str = "text", **more: object) -> Part:
    return Part(**{"name": name, "owner": "dist-a", "rows": rows, "dims": {}} | more)  # type: ignore[arg-type]


def pieces(way: Spelling, shape: tuple[int, ...], **axes: tuple[int, ...]) -> list:
    return list(way.pieces(shape, {}, axes))


def test_at_is_the_whole_tensor():
    (piece,) = pieces(at("w"), (3, 5))
    assert (piece.name, piece.shape, piece.region) == ("w", (3, 5), (slice(0, 3), slice(0, 5)))


def test_cat_of_two_along_rows_and_along_columns():
    gate, up = pieces(cat("gate", "up"), (6, 5))
    assert (gate.shape, gate.region) == ((3, 5), (slice(0, 3), slice(0, 5)))
    assert (up.shape, up.region) == ((3, 5), (slice(3, 6), slice(0, 5)))
    left, right = pieces(cat("l", "r", dim=1), (6, 4))
    assert left.region == (slice(0, 6), slice(0, 2))
    assert right.region == (slice(0, 6), slice(2, 4))


def test_stack_of_cat_of_experts_gate_and_up_is_the_fused_tensor():
    # [E, 2I, H] from 2 E matrices [I, H], as the fused and the per-expert hub layouts have it.
    E, I, H = 4, 3, 5  # noqa: E741
    gates, ups = torch.randn(E, I, H), torch.randn(E, I, H)
    fused = torch.cat([gates, ups], dim=1)
    disk = {f"e.{e}.gate_proj.weight": gates[e] for e in range(E)}
    disk |= {f"e.{e}.up_proj.weight": ups[e] for e in range(E)}
    way = stack("expert", cat("e.{expert}.gate_proj.weight", "e.{expert}.up_proj.weight"))
    made = torch.full((E, 2 * I, H), torch.nan)
    for piece in pieces(way, (E, 2 * I, H), expert=tuple(range(E))):
        assert piece.shape == (I, H)
        made[piece.region] = disk[piece.name][None]
        assert torch.equal(fused[piece.region].squeeze(0), disk[piece.name])
    assert torch.equal(made, fused)


def test_stack_takes_the_values_of_its_axis_not_the_slots():
    found = pieces(stack("expert", "e.{expert}.w"), (2, 3), expert=(5, 9))
    assert [(piece.name, piece.region[0]) for piece in found] == [
        ("e.5.w", slice(0, 1)),
        ("e.9.w", slice(1, 2)),
    ]


def _random_way(rng: random.Random, ndim: int, depth: int) -> tuple[Spelling, list[int], dict]:
    """A random spelling, sizes that it tiles, and its axes; names are made unique by caller."""
    if depth == 0 or rng.random() < 0.25:
        name = f"leaf{rng.random()}"
        return at(name), [rng.randint(1, 3) for _ in range(ndim)], {}
    if ndim > 1 and rng.random() < 0.4:
        axis = f"axis{depth}"
        values = tuple(rng.sample(range(50), rng.randint(1, 4)))
        inner, sizes, axes = _random_way(rng, ndim - 1, 0)
        inner = at(f"{inner.name}.{{{axis}}}")  # type: ignore[attr-defined]
        return stack(axis, inner), [len(values), *sizes], {**axes, axis: values}
    dim, count = rng.randrange(ndim), rng.randint(1, 3)
    first, sizes, axes = _random_way(rng, ndim, depth - 1)
    # The other parts take the same sizes: leaves do, whatever the first one is made of.
    others = [at(f"leaf{rng.random()}") for _ in range(count - 1)]
    parts = [first, *others]
    rng.shuffle(parts)
    sizes[dim] *= count
    return cat(*parts, dim=dim), sizes, axes


@pytest.mark.parametrize("seed", range(200))
def test_regions_tile_exactly(seed: int):
    rng = random.Random(seed)
    way, sizes, axes = _random_way(rng, rng.randint(1, 4), 3)
    shape = tuple(sizes)
    covered = torch.zeros(shape, dtype=torch.int64)
    names = []
    for piece in pieces(way, shape, **axes):
        covered[piece.region] += 1
        names.append(piece.name)
        extent = tuple(s.stop - s.start for s in piece.region)
        assert tuple(covered[piece.region].shape) == extent  # no slice ran over the edge
        assert extent[len(extent) - len(piece.shape) :] == piece.shape
        assert all(size == 1 for size in extent[: len(extent) - len(piece.shape)])
    assert len(set(names)) == len(names)
    assert bool((covered == 1).all())


@pytest.mark.parametrize(
    ("way", "shape", "says"),
    [
        (cat("a", "b"), (5, 2), "2 equal parts do not tile"),
        (cat("a", "b", "c", dim=1), (3, 4), "3 equal parts do not tile"),
        (stack("expert", "e.{expert}"), (4, 2), "axis expert has 3 values, the stack 4"),
    ],
)
def test_what_does_not_tile_is_an_error(way: Spelling, shape: tuple[int, ...], says: str):
    with pytest.raises(ValueError, match=says):
        pieces(way, shape, expert=(0, 1, 2))


def test_a_row_expands_over_its_own_axis_in_order():
    row = Row("m.layers.{linear}.w", "heads*2*size hidden", "attn", NF4, kind=LINEAR)
    dims, axes = {"heads": 4, "size": 8, "hidden": 3}, {"linear": (0, 1, 4)}
    table = Table([part(row, dims=dims, axes=axes, groups={"attn": Aim.ON})])
    assert [tensor.name for tensor in table] == [f"m.layers.{n}.w" for n in (0, 1, 4)]
    assert [tensor.index for tensor in table] == [0, 1, 4]
    assert {tensor.shape for tensor in table} == {(64, 3)}
    assert table["m.layers.4.w"].numel == 192
    assert len(table) == 3
    assert table.part("text").rows == (row,)


def test_a_row_without_axis_is_one_tensor_and_integers_are_sizes():
    table = Table([part(Row("conv.weight", "n 1 4", "conv", FP32), dims={"n": 7})])
    (tensor,) = table
    assert (tensor.shape, tensor.index, tensor.row.axis) == ((7, 1, 4), None, None)


def test_spellings_of_a_tensor_use_its_own_index():
    row = Row(
        "m.{layer}.experts.gate_up",
        "experts 2*ffn hidden",
        "experts",
        also=stack("expert", cat("m.{layer}.e.{expert}.gate", "m.{layer}.e.{expert}.up")),
    )
    axes = {"layer": (2,), "expert": (0, 1)}
    (tensor,) = Table([part(row, dims={"experts": 2, "ffn": 3, "hidden": 5}, axes=axes)])
    plain, apart = tensor.spellings()
    assert [piece.name for piece in plain] == ["m.2.experts.gate_up"]
    assert [piece.name for piece in apart] == [
        "m.2.e.0.gate", "m.2.e.0.up", "m.2.e.1.gate", "m.2.e.1.up",
    ]  # fmt: skip


def test_a_dim_with_two_values_names_both_parts():
    text = part(Row("a", "hidden", "g"), dims={"hidden": 2048})
    tower = part(Row("b", "hidden", "g"), name="vision", dims={"hidden": 4096})
    with pytest.raises(InputError) as caught:
        Table([text, tower])
    assert caught.value.code == "QC-TABLE-001"
    assert caught.value.exit_code == 65
    assert "'hidden' has two values" in caught.value.message
    assert "2048 and 4096" in caught.value.message
    assert "text and vision" in caught.value.message


def test_the_same_value_twice_is_no_contradiction():
    text = part(Row("a", "hidden", "g"), dims={"hidden": 8})
    mtp = part(Row("b", "2*hidden", "g"), name="mtp", dims={"hidden": 8})
    assert [tensor.shape for tensor in Table([text, mtp])] == [(8,), (16,)]


def test_a_name_twice_names_both_owners():
    one = part(Row("a.w", "4", "g"))
    two = part(Row("a.w", "4", "g"), name="other", owner="dist-b")
    with pytest.raises(PluginError, match="dist-a and dist-b") as caught:
        Table([one, two])
    assert (caught.value.code, caught.value.field) == ("QC-TABLE-002", "a.w")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (Row("a", "hiden", "g"), "dimension 'hiden' is not defined"),
        (Row("a", "2*hiden 3", "g"), "dimension 'hiden' is not defined"),
        (Row("a.{experts}", "3", "g"), "axis 'experts' is not defined"),
    ],
)
def test_what_a_part_does_not_define_is_the_plugins_fault(row: Row, says: str):
    with pytest.raises(PluginError) as caught:
        Table([part(row, dims={"hidden": 3}, axes={"expert": (0,)})])
    assert caught.value.code == "QC-TABLE-003"
    assert caught.value.exit_code == 69
    assert says in caught.value.message


@pytest.mark.parametrize("kind", [LINEAR, PARAMETER, EXPERTS])
def test_a_row_for_lora_needs_the_aim_of_its_group(kind: Kind):
    row = Row("w", "4 4 4" if kind is EXPERTS else "4 4", "attn", kind=kind)
    with pytest.raises(PluginError, match="group 'attn' has no aim") as caught:
        Table([part(row, groups={"mlp": Aim.ON})])
    assert (caught.value.code, caught.value.field) == ("QC-TABLE-004", "w")
    assert caught.value.exit_code == 69
    assert "part 'text' of dist-a" in caught.value.message
    assert len(Table([part(Row("w", "4", "norm"))])) == 1  # a row that LoRA passes by needs none


def test_groups_of_all_parts_are_one_list():
    text = part(Row("a", "4 4", "attn", kind=LINEAR), groups={"attn": Aim.ON, "mlp": Aim.ASKED})
    # A part may use the group of another: whose it is does not matter.
    other = part(
        Row("b", "4 4", "attn", kind=LINEAR), name="mtp",
        groups={"mtp": Aim.NEVER, "attn": Aim.ON},
    )  # fmt: skip
    table = Table([text, other])
    assert table.groups == {"attn": Aim.ON, "mlp": Aim.ASKED, "mtp": Aim.NEVER}
    without = part(Row("b", "4 4", "attn", kind=LINEAR), name="mtp")
    assert Table([without, text]).groups == {"attn": Aim.ON, "mlp": Aim.ASKED}


def test_a_group_with_two_aims_is_the_plugins_fault():
    text = part(Row("a", "4 4", "attn", kind=LINEAR), groups={"attn": Aim.ON})
    other = part(Row("b", "4", "g"), name="mtp", owner="dist-b", groups={"attn": Aim.NEVER})
    with pytest.raises(PluginError, match="group 'attn' has two aims") as caught:
        Table([text, other])
    assert caught.value.code == "QC-TABLE-004"
    assert "part 'mtp' of dist-b" in caught.value.message


def test_in_a_namespace_the_first_prefix_that_matches_wins():
    text = Namespace(
        name="text", prefixes=(("model.language_model.", "model."), ("model.", "deep."))
    )
    assert text.spell("model.language_model.norm.weight") == "model.norm.weight"
    assert text.spell("model.visual.x") == "deep.visual.x"
    assert text.spell("lm_head.weight") == "lm_head.weight"
    assert Namespace(name="hub").spell("model.x") == "model.x"
