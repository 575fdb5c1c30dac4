"""Positions of rows with media against transformers, and rope and trunk on them, packed."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support import blocks_kit, layouts, moe_kit
from support.blocks_kit import relative
from support.e2e_kit import figure, ours, stock, vocabulary, write_stock
from support.layouts import TOKENS, Row, generated, image, row, rows, tensors, video
from torch import Tensor
from transformers import Qwen3_5Config, Qwen3_5Model, Qwen3_5MoeConfig, Qwen3_5MoeModel
from transformers.models.qwen3_5 import modeling_qwen3_5 as dense
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as moe

from qcore.api.blocks import Packed
from qcore.api.media import Placed, RowError
from qcore_multimodal.positions import place
from qcore_qwen35.rope import Rope

KINDS = ["dense", "moe"]
TOWER = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 48,
    "patch_size": 4, "num_position_embeddings": 16,
}  # fmt: skip


def whole_model(kind: str, merge: int) -> Any:
    """transformers' model with its tower: only that can tell positions."""
    tower = TOWER | {"spatial_merge_size": merge}
    if kind == "dense":
        text = blocks_kit.tiny_config(layers=["full_attention"])
        return Qwen3_5Model(Qwen3_5Config(text_config=text, vision_config=tower))
    text = moe_kit.moe_config(layers=["full_attention"])
    return Qwen3_5MoeModel(Qwen3_5MoeConfig(text_config=text, vision_config=tower))


def reference(model: Any, given: Row) -> tuple[Tensor, int]:
    """``[3, T]`` and what must be added to an index behind the row."""
    positions, delta = model.get_rope_index(
        torch.tensor(given.ids)[None],
        given.types[None],
        image_grid_thw=given.grids("image"),
        video_grid_thw=given.grids("video"),
    )
    return positions[:, 0], int(delta)


def placed(given: Row) -> Placed:
    return place(given.ids, given.media, TOKENS)


def positions(given: Row) -> Tensor:
    return tensors(placed(given).positions)


def followed(given: Row) -> int:
    """Where the text goes on behind a row: a token more is placed there, on every axis."""
    longer = place([*given.ids, 1], given.media, TOKENS)
    (after,) = {axis[-1] for axis in longer.positions}
    return after


@pytest.mark.parametrize("merge", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_positions(kind: str, merge: int) -> None:
    model = whole_model(kind, merge)
    apart = 0
    for given in rows(merge):
        expected, delta = reference(model, given)
        assert torch.equal(positions(given), expected), given.name
        assert followed(given) == len(given.ids) + delta, given.name
        pads = given.types.nonzero().flatten().tolist()
        assert placed(given).where.tolist() == pads, given.name
        apart += not torch.equal(expected[1], expected[2])
    assert len(rows(merge)) >= 60
    assert apart >= 40  # rows in which an axis for another would show


def test_a_row_by_hand() -> None:
    given = row("by hand", 2, image(2, 3), 1, bare=True)
    found = placed(given)
    assert found.where.tolist() == [2, 3, 4, 5, 6, 7]
    assert [axis.tolist() for axis in found.positions] == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert followed(given) == 6


def test_nothing() -> None:
    found = place((), (), TOKENS)
    assert [len(axis) for axis in (found.where, *found.positions)] == [0, 0, 0, 0]


@pytest.mark.parametrize("of", [list, tuple, partial(array, "i")], ids=["list", "tuple", "array"])
def test_any_sequence_of_ids(of: Callable[[tuple[int, ...]], Any]) -> None:
    given = rows()[23]
    assert place(of(given.ids), given.media, TOKENS) == placed(given)


def test_a_long_row_takes_milliseconds() -> None:
    parts = [part for _ in range(20) for part in (50, image(40, 40), video(32, 9, 10))]
    parts += [65_536 - len(row("", *parts).ids)]
    given = row("long", *parts)
    assert len(given.ids) == 65_536
    took = []
    for _ in range(5):
        start = time.process_time()
        placed(given)
        took.append(time.process_time() - start)
    figure(f"positions of 65,536 tokens in {min(took) * 1e3:.1f} ms")
    assert min(took) < 0.1  # ten of them; the rest is room for a busy machine


# -- runs that are not the media's

PIC, CLIP = image(2, 3), video(4, 2, 2)
P, V = TOKENS["<|image_pad|>"], TOKENS["<|video_pad|>"]
RUNS: dict[str, tuple[list[int], list[Any], str, str]] = {
    "none": ([1, 2, 3], [PIC], "none", "6 consecutive"),
    "one short": ([1, *[P] * 5, 2], [PIC], "5 among 6 from token 1", "6 consecutive"),
    "one long": ([1, *[P] * 7, 2], [PIC], "more than 6 from token 1", "6 consecutive"),
    "short at the end": ([1, *[P] * 5], [PIC], "5 among 6 from token 1", "6 consecutive"),
    "a hole": ([1, *[P] * 3, 2, *[P] * 3, 2], [PIC], "5 among 6 from token 1", "6 consecutive"),
    "nothing between": ([1, *[P] * 12, 2], [PIC, PIC], "more than 6 from token 1", "6 consecutive"),
    "another kind": ([1, *[V] * 6, 2], [PIC], "none", "6 consecutive"),
    "one of another kind": (
        [1, P, P, V, P, P, P],
        [PIC],
        "5 among 6 from token 1",
        "6 consecutive",
    ),
    "frames that touch": ([1, *[V] * 8, 2], [CLIP], "more than 4 from token 1", "4 consecutive"),
    "a frame missing": ([1, *[V] * 4, 2], [CLIP], "none", "4 consecutive"),
    "a frame too many": ([*[V] * 4, 2, *[V] * 4, 2, *[V] * 4], [CLIP], "12", "8"),
    "another order": ([*[V] * 4, 2, *[V] * 4, *[P] * 6], [PIC, CLIP], "none", "4 consecutive"),
    "an image without a medium": ([1, *[P] * 6, 2], [], "6", "0"),
    "one token of a video": ([1, *[P] * 6, 2, V], [PIC], "1", "0"),
}


@pytest.mark.parametrize("case", RUNS)
def test_refused(case: str) -> None:
    ids, media, found, expected = RUNS[case]
    with pytest.raises(RowError) as caught:
        place(ids, media, TOKENS)
    error = caught.value.error(None, 3)
    assert error.code == "QC-VISION-052"
    assert (str(error.found), str(error.expected)) == (found, expected)
    assert "\n" not in str(error)


# -- rope and trunk, packed

#: Two documents with media each, then one of text alone.
PACK = [generated(0), rows()[23], row("text", 11, seed=5)]
DEFAULT: dict[str, Any] = {
    "rope_type": "default",
    "rope_theta": 10_000_000,
    "partial_rotary_factor": 0.25,
    "mrope_section": [11, 11, 10],
    "mrope_interleaved": True,
}
YARN = DEFAULT | {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262_144,
}  # fmt: skip
#: A context so short that the documents reach beyond it.
SHORT = {"original_max_position_embeddings": 32}


#: Short ones, as the tiny checkpoint's logits are 1e-5 off float64 on longer ones, on both sides.
LOADED = [PACK[1], rows()[10], PACK[2]]


def packed(documents: list[Row]) -> Packed:
    made = Packed.of([torch.tensor(one.ids) for one in documents])
    made.positions = torch.cat([positions(one) for one in documents], 1)
    return made


def test_the_pack_has_media_in_two_documents() -> None:
    assert [bool(one.media) for one in PACK] == [True, True, False]
    assert {seen.kind for one in PACK for seen in one.media} == {"image", "video"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rope", [DEFAULT, YARN, YARN | SHORT], ids=["default", "yarn", "short"])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_of_a_pack(kind: str, rope: dict[str, Any], dtype: torch.dtype) -> None:
    changes: dict[str, Any] = {"head_dim": 256, "rope_parameters": rope}
    whole = whole_model(kind, 2)
    if kind == "dense":
        text = blocks_kit.tiny_config(**changes)
        theirs: Any = dense.Qwen3_5TextRotaryEmbedding(dense.Qwen3_5TextConfig(**text))
    else:
        text = moe_kit.moe_config(**changes)
        theirs = moe.Qwen3_5MoeTextRotaryEmbedding(moe.Qwen3_5MoeTextConfig(**text))
    batch = packed(PACK)
    expected = [
        theirs(torch.zeros(1, dtype=dtype), reference(whole, one)[0][:, None]) for one in PACK
    ]
    for number, mine in enumerate(Rope.of(text).tables(batch, dtype)):
        other = torch.cat([both[number][0] for both in expected])
        assert torch.equal(mine[:, 0], other)
        line = torch.cat([torch.arange(len(one.ids)) for one in PACK])
        plain = theirs(torch.zeros(1, dtype=dtype), line[None, None].expand(3, 1, -1))
        assert not torch.equal(mine[:, 0], plain[number][0])  # positions of text would show


SMALL_ROPE = {"partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2], "rope_theta": 10_000.0}


@pytest.mark.parametrize(
    "rope", [DEFAULT | SMALL_ROPE, YARN | SHORT | SMALL_ROPE], ids=["default", "yarn"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_of_a_pack(kind: str, rope: dict[str, Any]) -> None:
    """Each document alone in transformers' text model, all in one pack in ours."""
    made: Any = (
        blocks_kit.twins(blocks_kit.tiny_config(rope_parameters=rope))
        if kind == "dense"
        else moe_kit.twins(moe_kit.moe_config(rope_parameters=rope))
    )
    whole, batch = whole_model(kind, 2), packed(PACK)
    embedded = made.ours.embed(batch).detach()
    mine = embedded.clone().requires_grad_()
    found = made.logits(batch, mine)
    pieces = [
        piece.clone().requires_grad_() for piece in embedded.split([len(one.ids) for one in PACK])
    ]
    expected = torch.cat(
        [
            made.theirs(
                inputs_embeds=piece[None], position_ids=reference(whole, one)[0][:, None],
                use_cache=False,
            ).logits[0]
            for one, piece in zip(PACK, pieces, strict=True)
        ]
    )  # fmt: skip
    torch.manual_seed(3)
    direction = torch.randn_like(expected) / len(expected)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    gradient = torch.cat([piece.grad for piece in pieces])
    gaps = relative(found, expected), relative(mine.grad, gradient)
    figure(f"{kind}: logits {gaps[0]:.1e}, gradients {gaps[1]:.1e} relative")
    assert max(gaps) <= 1e-5
    assert gradient.abs().sum(1).min() > 0
    batch = Packed.of([torch.tensor(one.ids) for one in PACK])
    assert relative(made.logits(batch, embedded), expected) > 1e-3  # text positions would show


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_a_loaded_model(kind: str, tmp_path: Any) -> None:
    folder = write_stock(tmp_path / "base", "vl", moe=kind == "moe")
    assert vocabulary() >= layouts.VOCAB
    theirs, model = stock(folder, "text", moe=kind == "moe"), ours(folder)
    whole, batch = whole_model(kind, 2), packed(LOADED)
    with torch.no_grad():
        found = model.eval().logits(batch)
        expected = torch.cat(
            [
                theirs(
                    torch.tensor(one.ids)[None], position_ids=reference(whole, one)[0][:, None],
                    use_cache=False,
                ).logits[0]
                for one in LOADED
            ]
        )  # fmt: skip
    gap = relative(found, expected)
    figure(f"{kind}: logits of a loaded model {gap:.1e} relative")
    assert gap <= 2e-5  # the rounding of both sides, each up to 1e-5 off float64
