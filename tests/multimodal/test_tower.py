"""The tower against transformers' two classes on random weights: outputs and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.blocks_kit import relative
from support.e2e_kit import figure
from support.vision_kit import Grid, Towers, layouts, run, towers
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from qcore.nn.recompute import run_layers
from qcore_multimodal import tower as tower_module
from qcore_multimodal.attention import Frames
from qcore_multimodal.media_batch import PixelBatch
from qcore_multimodal.pos_embed import interpolation
from qcore_multimodal.rope import patch_coordinates

LAYOUTS = layouts()


@pytest.fixture(scope="module", params=["dense", "moe"])
def both(request: pytest.FixtureRequest) -> Towers:
    return towers(request.param)


@pytest.mark.parametrize("grids", LAYOUTS, ids=lambda grids: "+".join(map(str, grids)))
def test_outputs(both: Towers, grids: list[Grid]) -> None:
    media = both.media(grids)
    with torch.no_grad():
        theirs, mine = both.reference(media), run(both.ours, media)
    assert mine.shape == theirs.shape == (len(media.where), both.section["out_hidden_size"])
    assert 0.5 < float(theirs.abs().max()) < 20
    assert float((mine - theirs).abs().max()) <= 1e-5


def gradients(model: torch.nn.Module, out: torch.Tensor, wanted: torch.Tensor) -> dict[str, Any]:
    for parameter in model.parameters():
        parameter.grad = None
    (out * wanted).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def everything_trained(both: Towers) -> None:
    for parameter in (*both.theirs.parameters(), *both.ours.parameters()):
        parameter.requires_grad_(True)


@pytest.mark.parametrize("grids", LAYOUTS[::3], ids=lambda grids: "+".join(map(str, grids)))
def test_gradient_of_every_parameter(both: Towers, grids: list[Grid]) -> None:
    everything_trained(both)
    media = both.media(grids, seed=1)
    generator = torch.Generator().manual_seed(2)
    wanted = torch.randn(len(media.where), both.section["out_hidden_size"], generator=generator)
    theirs = gradients(both.theirs, both.reference(media), wanted)
    mine = gradients(both.ours, run(both.ours, media), wanted)
    assert mine.keys() == theirs.keys()
    worst = 0.0
    for name, gradient in theirs.items():
        assert gradient is not None, name
        assert float(gradient.abs().max()) > 1e-3, name
        worst = max(worst, relative(mine[name], gradient))
    figure(f"{len(theirs)} parameters of {grids}: gradients {worst:.1e} relative")
    assert worst <= 1e-5


def test_nine_billion_block() -> None:
    """One block of the real width: 16 heads of 72, whose size no power of two divides."""
    both = towers(
        depth=1, hidden_size=1152, intermediate_size=4304, num_heads=16, patch_size=16,
        out_hidden_size=128, num_position_embeddings=2304,
    )  # fmt: skip
    everything_trained(both)
    media = both.media([(1, 4, 6), (3, 2, 4)])
    wanted = torch.randn(len(media.where), 128, generator=torch.Generator().manual_seed(0))
    theirs, mine = both.reference(media), run(both.ours, media)
    figure(f"full width: {relative(mine, theirs):.1e} relative")
    assert relative(mine, theirs) <= 1e-5
    expected = gradients(both.theirs, theirs, wanted)
    found = gradients(both.ours, mine, wanted)
    for name in ("blocks.0.attn.qkv.weight", "blocks.0.mlp.linear_fc2.weight", "pos_embed.weight"):
        assert relative(found[name], expected[name]) <= 1e-5


def test_bf16_is_as_near_to_float32_as_the_stock_class() -> None:
    """Both round a dozen times a block; ours must not be the worse of the two."""
    mine, theirs = 0.0, 0.0
    for seed, grids in enumerate(LAYOUTS[4::4]):
        exact, rounded = (
            towers(dtype=dtype, seed=seed, depth=4) for dtype in (torch.float32, torch.bfloat16)
        )
        # The same weights on both sides: those of bf16.
        exact.theirs.load_state_dict(rounded.theirs.state_dict())
        media = exact.media(grids, seed)
        media.values = media.values.bfloat16().float()
        with torch.no_grad():
            true = exact.reference(media)
            theirs += float((rounded.reference(media).float() - true).square().sum())
            mine += float((run(rounded.ours, media).float() - true).square().sum())
    ratio = (mine / theirs) ** 0.5
    figure(f"error in bf16 is {ratio:.3f} of transformers'")
    assert ratio <= 1.05


@pytest.mark.parametrize("policy", ["elementwise", "full"])
def test_recompute_changes_no_bit(policy: str) -> None:
    both = towers(seed=3)
    everything_trained(both)
    media = both.media([(1, 4, 6), (2, 2, 4), (1, 6, 4)])
    wanted = torch.randn(len(media.where), 40, generator=torch.Generator().manual_seed(0))
    found = []
    for one in ("none", policy):
        x, layers = both.ours.embed(media), both.ours.layers
        out = run_layers(layers, x, media, [one] * len(layers))
        found.append((out.detach(), gradients(both.ours, out, wanted)))
    (plain, first), (again, second) = found
    assert torch.equal(plain, again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(first) == 3 + 12 * 2 + 6


def test_bytes_and_a_table_are_the_numbers() -> None:
    both = towers()
    section, grids = both.section, [(1, 4, 4), (2, 2, 6)]
    generator = torch.Generator().manual_seed(0)
    size = 3 * 2 * section["patch_size"] ** 2
    values = torch.randint(256, (40, size), dtype=torch.uint8, generator=generator)
    table = torch.randn(3, 256, generator=generator)  # a table a channel, no two alike
    numbers = torch.stack(
        [table[c][values.view(40, 3, -1)[:, c].long()] for c in range(3)], 1
    ).flatten(1)
    where = torch.arange(10)
    media = PixelBatch(
        values=values, grids=tuple(grids), where=where, table=torch.stack([table + 1, table]),
        kinds=torch.ones(40, dtype=torch.uint8),
    )  # fmt: skip
    plain = both.media(grids)
    plain.values = numbers
    with torch.no_grad():
        assert torch.equal(run(both.ours, media), run(both.ours, plain))
        assert float((run(both.ours, media) - both.reference(plain)).abs().max()) <= 1e-5
    assert media.to(torch.device("meta")).table.is_meta


@pytest.mark.parametrize("at_a_time", [1, 7, 24])
def test_patches_are_embedded_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch, at_a_time: int
) -> None:
    both = towers()
    media = both.media([(1, 4, 6), (1, 2, 2)])
    with torch.no_grad():
        whole = both.ours.embed(media)
        monkeypatch.setattr("qcore_multimodal.tower._PATCHES_PER_SLICE", at_a_time)
        assert relative(both.ours.embed(media), whole) <= 1e-6


def test_frames_of_one_length_are_one_batch() -> None:
    cpu = torch.device("cpu")
    apart = Frames.of([(1, 4, 6), (2, 2, 2), (1, 6, 4)], cpu)
    assert apart.groups == ((2, 24), (2, 4))
    assert apart.order is not None
    assert apart.inverse is not None
    assert apart.order.tolist() == [*range(24), *range(32, 56), *range(24, 32)]
    assert torch.equal(apart.order[apart.inverse], torch.arange(56))
    hundred = Frames.of([(1, 4, 6)] * 100, cpu)
    assert hundred.groups == ((100, 24),)
    assert hundred.order is None
    sorted_ones = Frames.of([(1, 2, 2), (3, 2, 2), (1, 4, 4)], cpu)
    assert sorted_ones.groups == ((4, 4), (1, 16))
    assert sorted_ones.order is None


def test_a_frame_does_not_see_another() -> None:
    both = towers()
    media = both.media([(2, 4, 4), (1, 4, 4)])
    with torch.no_grad():
        before = run(both.ours, media)
        media.values[:16] += 1
        after = run(both.ours, media)
    assert not torch.equal(before[:4], after[:4])
    assert torch.equal(before[4:], after[4:])


def test_bytes_without_a_table_are_refused() -> None:
    both = towers()
    media = both.media([(1, 2, 2)])
    numbers, media.values = media.values, (media.values * 100).byte()
    with pytest.raises(ValueError, match="uint8, with no table"):
        both.ours.embed(media)
    fields = {"grids": media.grids, "where": media.where, "table": torch.zeros(1, 3, 256)}
    fields["kinds"] = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="float32, with a table"):
        both.ours.embed(PixelBatch(values=numbers, **fields))


#: The largest picture, the thinnest ones, the longest video of the published limits.
EXTREME: list[list[Grid]] = [
    [(1, 256, 256)],
    [(1, 2, 400), (1, 400, 2)],
    [(384, 16, 16)],
    [(1, 2, 2), (1, 48, 48), (1, 47 * 2, 50)],
]


@pytest.mark.parametrize("grids", EXTREME, ids=lambda grids: "+".join(map(str, grids)))
def test_places_and_positions_of_extreme_grids(grids: list[Grid]) -> None:
    thw = torch.tensor(grids)
    assert torch.equal(torch.stack(patch_coordinates(grids, 2), 1), get_vision_position_ids(thw, 2))
    index, share = interpolation(grids, 2, 48)
    theirs_index, theirs_share = get_vision_interpolation_indices_and_weights(
        thw, 48, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    assert torch.equal(index, theirs_index)
    assert torch.equal(share, theirs_share)


def _all_one_frame(grids: Any, device: torch.device) -> Frames:
    return Frames(((1, sum(t * h * w for t, h, w in grids)),))


def _raster(grids: Any, merge: int) -> tuple[torch.Tensor, torch.Tensor]:
    return patch_coordinates(grids, 1)


def _no_turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x


def _rotate_neighbours(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos + turned * sin


AT = "qcore_multimodal"
#: One rule changed: where it is, and what stands in.
MUTATIONS: dict[str, tuple[str, Any]] = {
    "frames see each other": (f"{AT}.attention.Frames.of", staticmethod(_all_one_frame)),
    "rope of raster order": (f"{AT}.rope.patch_coordinates", _raster),
    "positions of raster order": (f"{AT}.pos_embed.patch_coordinates", _raster),
    "no rope": (f"{AT}.attention.rotate", _no_turn),
    "rope of neighbours": (f"{AT}.attention.rotate", _rotate_neighbours),
    "another theta": (f"{AT}.rope.THETA", 1e6),
    "another eps": (f"{AT}.linear._EPS", 1e-3),
}


@pytest.mark.parametrize("rule", MUTATIONS)
def test_a_changed_rule_is_seen(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    """What the parity above would let through, if it held no more."""
    monkeypatch.setattr(*MUTATIONS[rule])
    both = towers()
    media = both.media([(2, 4, 6), (1, 6, 4)])
    with torch.no_grad():
        assert relative(run(both.ours, media), both.reference(media)) > 1e-4


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_both_forms_of_gelu_matter(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Tanh in the blocks, exact in the merger: neither may be the other."""
    real = tower_module.activated
    monkeypatch.setattr(tower_module, "activated", lambda made, x, _: real(made, x, form))
    both = towers()
    media = both.media([(2, 4, 6)])
    with torch.no_grad():
        assert float((run(both.ours, media) - both.reference(media)).abs().max()) > 5e-5


def test_values_of_another_number_of_patches_are_refused() -> None:
    both = towers()
    media = both.media([(1, 4, 4)])
    media.grids = ((1, 4, 6),)
    with pytest.raises(ValueError, match="for 24 patches of 96 numbers"):
        both.ours.embed(media)
