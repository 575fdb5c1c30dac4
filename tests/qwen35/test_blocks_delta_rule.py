"""The chunked delta rule against the rule itself, token by token; its cost and its memory."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from support.blocks_kit import Written, relative
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5

from qcore_qwen35.ops.delta_rule import Chunks, chunked, chunked_delta_rule, recurrent_delta_rule

LENGTHS = [(1,), (2,), (63,), (64,), (65,), (130,), (64, 1, 65), (3, 200, 64, 0, 9)]
#: log decay and write strength: (lowest g, highest g, lowest beta, highest beta)
RANGES = {
    "usual": (-0.5, 0.0, 0.1, 0.9),
    "keeps all": (-1e-6, 0.0, 0.0, 1.0),
    "forgets all": (-60.0, -20.0, 0.0, 1.0),
    "keeps or forgets": (-30.0, 0.0, 0.0, 1.0),
    "writes nothing": (-0.1, 0.0, 0.0, 1e-6),
    "writes all": (-0.1, 0.0, 1 - 1e-6, 1.0),
}
GROUPS = [(1, 1), (2, 2), (2, 4), (1, 3)]


def inputs(
    tokens: int,
    heads: tuple[int, int] = (2, 4),
    values: tuple[float, float, float, float] = RANGES["usual"],
    dtype: torch.dtype = torch.float64,
    dims: tuple[int, int] = (8, 6),
) -> list[Tensor]:
    torch.manual_seed(tokens + heads[1])
    (hk, hv), (dk, dv) = heads, dims
    low, high, weak, strong = values
    made = [
        torch.randn(tokens, hk, dk),
        torch.randn(tokens, hk, dk),
        torch.randn(tokens, hv, dv),
        torch.rand(tokens, hv) * (high - low) + low,
        torch.rand(tokens, hv) * (strong - weak) + weak,
    ]
    return [x.to(dtype).requires_grad_() for x in made]


def cumulative(lengths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sum(lengths[:n]) for n in range(len(lengths) + 1))


def both(
    arguments: list[Tensor], lengths: tuple[int, ...], start: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """(o, states, gradients...) of the chunked form and of the rule."""
    leaves = arguments if start is None else [*arguments, start]
    cu_seqlens, results = cumulative(lengths), []
    for rule in (chunked_delta_rule, recurrent_delta_rule):
        o, states = rule(*arguments, cu_seqlens, start)
        torch.manual_seed(1)
        loss = (o * torch.randn(o.shape)).sum() + (states * torch.randn(states.shape)).sum()
        results.append([o.detach(), states.detach(), *torch.autograd.grad(loss, leaves)])
    return results[0], results[1]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["from-zero", "from-a-state"])
def test_equal_in_outputs_states_and_gradients(lengths: tuple[int, ...], given: bool) -> None:
    start = torch.randn(len(lengths), 4, 8, 6, dtype=torch.float64, requires_grad=True)
    mine, rule = both(inputs(sum(lengths)), lengths, start if given else None)
    assert mine[1].shape == (len(lengths), 4, 8, 6)
    for a, b in zip(mine, rule, strict=True):
        assert relative(a, b) <= 1e-11


@pytest.mark.parametrize("values", RANGES.values(), ids=RANGES)
@pytest.mark.parametrize("heads", GROUPS, ids=str)
def test_decay_and_write_strength_at_their_ends(
    values: tuple[float, float, float, float], heads: tuple[int, int]
) -> None:
    start = torch.randn(2, heads[1], 8, 6, dtype=torch.float64, requires_grad=True)
    mine, rule = both(inputs(100, heads, values), (70, 30), start)
    for a, b in zip(mine, rule, strict=True):
        assert torch.isfinite(a).all()
        assert float((a - b).abs().max()) <= 1e-9 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("values", RANGES.values(), ids=RANGES)
def test_float32_is_as_close_as_float32_can_be(values: tuple[float, float, float, float]) -> None:
    """Against the rule in float64, on the float32 numbers."""
    single = inputs(150, values=values, dtype=torch.float32, dims=(32, 32))
    double = [x.detach().double().requires_grad_() for x in single]
    mine, _ = both(single, (150,), None)
    _, rule = both(double, (150,), None)
    for a, b in zip(mine, rule, strict=True):
        assert float((a - b).abs().max()) <= 2e-5 * max(1.0, float(b.abs().max()))


def test_equal_keys_do_not_break_the_inverse() -> None:
    """The system is all ones below the diagonal: powers of it would overflow float32."""
    q, k, v, g, beta = inputs(128, values=(-1e-6, 0.0, 1.0, 1.0), dtype=torch.float32)
    k = torch.ones_like(k).requires_grad_()
    mine, rule = both([q, k, v, g, beta], (128,), None)
    for a, b in zip(mine[:2], rule[:2], strict=True):
        assert relative(a, b) <= 1e-5


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gradcheck(size: int) -> None:
    arguments = inputs(5, (1, 2), dims=(3, 2))
    start = torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    layout = Chunks.of((0, 2, 5), size, torch.device("cpu"))

    def rule(*given: Tensor) -> tuple[Tensor, Tensor]:
        return chunked_delta_rule(*given[:5], (0, 2, 5), given[5], layout)

    assert torch.autograd.gradcheck(rule, (*arguments, start), atol=1e-7)


def test_a_continued_document_equals_the_whole() -> None:
    arguments = inputs(150, dtype=torch.float32)
    whole, last = chunked_delta_rule(*arguments, (0, 150))
    state, pieces = None, []
    for start, end in [(0, 64), (64, 65), (65, 130), (130, 150)]:
        o, state = chunked_delta_rule(*(x[start:end] for x in arguments), (0, end - start), state)
        pieces.append(o)
    assert relative(torch.cat(pieces), whole) <= 1e-5
    assert relative(state, last) <= 1e-5


def test_equal_to_the_reference_implementation() -> None:
    q, k, v, g, beta = (x.detach() for x in inputs(130, dtype=torch.float32))
    theirs = inspect.unwrap(modeling_qwen3_5.torch_chunk_gated_delta_rule)
    wanted, last = theirs(
        *(x[None] for x in (q, k, v, g, beta)),
        use_qk_l2norm_in_kernel=True, output_final_state=True,
    )  # fmt: skip
    o, states = chunked_delta_rule(q, k, v, g, beta, (0, 130))
    assert relative(o, wanted[0]) <= 1e-5
    assert relative(states, last) <= 1e-5


def test_inputs_are_left_alone() -> None:
    """One head and full chunks: the case where splitting could hand out the input's memory."""
    arguments = inputs(64, (1, 1), dtype=torch.float32)
    before = [x.detach().clone() for x in arguments]
    start = torch.randn(1, 1, 8, 6)
    kept = start.clone()
    o, _ = chunked_delta_rule(*arguments, (0, 64), start)
    o.sum().backward()
    assert torch.equal(start, kept)
    for x, y in zip(arguments, before, strict=True):
        assert torch.equal(x, y)


def test_bfloat16_is_computed_in_float32_and_rounded_once() -> None:
    half = [x.detach().bfloat16() for x in inputs(100, dtype=torch.float32)]
    o, states = chunked_delta_rule(*half, (0, 100))
    wide, wide_states = chunked_delta_rule(*(x.float() for x in half), (0, 100))
    assert o.dtype is torch.bfloat16
    assert states.dtype is torch.float32
    assert torch.equal(o, wide.bfloat16())
    assert torch.equal(states, wide_states)


def cost(rule: Any, tokens: int) -> int:
    q, k, v, g, beta = inputs(tokens, (1, 1), dtype=torch.float32)
    with Written() as written:
        rule(q, k, v, g, beta).sum().backward()
    return written.elements


def test_cost_is_linear_in_tokens() -> None:
    def ours(*arguments: Tensor) -> Tensor:
        return chunked_delta_rule(*arguments, (0, len(arguments[0])))[0]

    unwrapped = inspect.unwrap(modeling_qwen3_5.torch_chunk_gated_delta_rule)

    def theirs(*arguments: Tensor) -> Tensor:
        return unwrapped(*(x[None] for x in arguments), use_qk_l2norm_in_kernel=True)[0]

    assert cost(ours, 4096) / cost(ours, 2048) < 2.05
    assert cost(theirs, 4096) / cost(theirs, 2048) > 3  # the meter does see quadratic cost


def test_kept_memory_is_the_inputs_and_little_more() -> None:
    """Beside the inputs, one state for every four chunks of a document."""
    arguments = inputs(512, (2, 2), dtype=torch.bfloat16, dims=(32, 32))
    kept: dict[int, Tensor] = {}

    def note(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        chunked_delta_rule(*arguments, (0, 512))
    inputs_alone = sum(x.untyped_storage().nbytes() for x in arguments)
    states = 512 // 64 // 4 * (2 * 32 * 32 * 4)
    assert sum(x.untyped_storage().nbytes() for x in kept.values()) == inputs_alone + states


@pytest.mark.parametrize("tile", [1, 3, 8, 10_000])
@pytest.mark.parametrize("lengths", [(300,), (3, 200, 64, 0, 9, 70)], ids=str)
def test_tiles_of_any_size_give_the_same(
    tile: int, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(chunked.TILE, "cpu", tile)
    monkeypatch.setattr(chunked, "HEADS", 1)
    start = torch.randn(len(lengths), 6, 8, 6, dtype=torch.float64, requires_grad=True)
    mine, rule = both(inputs(sum(lengths), (2, 6)), lengths, start)
    for a, b in zip(mine, rule, strict=True):
        assert relative(a, b) <= 1e-11


@pytest.mark.parametrize("lengths", [(5,), (64, 64), (3, 200, 64, 0, 9)], ids=str)
@pytest.mark.parametrize("chunks", [1, 2, 100])
def test_layout_is_a_round_trip(lengths: tuple[int, ...], chunks: int) -> None:
    layout = Chunks.of(cumulative(lengths), 64, torch.device("cpu"))
    x = torch.randn(sum(lengths), 3, 4)
    spread = layout.spread(x)
    assert layout.total == sum(-(-n // 64) for n in lengths)
    assert spread.shape == (layout.total, 64, 3, 4)
    assert torch.equal(layout.gather(spread), x)
    assert float(spread.abs().sum()) == pytest.approx(float(x.abs().sum()), rel=1e-5)
    segments = list(layout.segments(chunks))
    covered = [n for s in segments for n in range(layout.total)[s.chunks]]
    assert covered == list(range(layout.total))
    assert sum(len(s.steps) for s in segments) == max(-(-n // 64) for n in lengths)
    states = torch.randn(len(lengths), 2)
    assert torch.equal(layout.by_document(layout.by_length(states)), states)


def test_documents_of_a_plan_take_no_memory():
    from qcore_qwen35.ops.delta_inputs.reference import Documents

    planned = Documents.of((0, 5, 2**36), torch.device("meta"))
    assert planned.starts.shape == (2**36,)
    assert planned.starts.dtype == Documents.of((0, 5, 9), torch.device("cpu")).starts.dtype
