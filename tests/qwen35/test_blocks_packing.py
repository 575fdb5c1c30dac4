"""Packs: every document as if alone, equal to the reference's padded batches; cost and memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.blocks_kit import Twins, Written, documents, relative, tiny_config, twins
from torch import Tensor

from qcore.api.blocks import Packed
from qcore.nn.attention.varlen import cached_attention, varlen_attention
from qcore_qwen35.ops.delta_inputs.reference import causal_conv_silu

PACKS = [(5, 9), (64, 65, 1), (1, 1, 2), (130, 3, 64), (7, 7, 7, 2)]


@pytest.fixture(scope="module")
def pair() -> Twins:
    return twins(tiny_config())


@pytest.mark.parametrize("lengths", PACKS)
def test_packed_equals_alone(pair: Twins, lengths: tuple[int, ...]) -> None:
    docs = documents(*lengths)
    with torch.no_grad():
        found = pair.logits(Packed.of(docs)).split(lengths)
        for ids, mine in zip(docs, found, strict=True):
            assert float((mine - pair.logits(Packed.of([ids]))).abs().max()) <= 1e-5
            assert float((mine - pair.reference(ids)).abs().max()) <= 1e-5


@pytest.mark.parametrize("lengths", PACKS[:3])
def test_gradients_of_a_pack_are_the_sum_over_documents(
    pair: Twins, lengths: tuple[int, ...]
) -> None:
    docs = documents(*lengths, seed=2)
    weight = torch.randn(sum(lengths), pair.head.shape[0])
    pair.ours.zero_grad()
    (pair.logits(Packed.of(docs)) * weight).sum().backward()
    packed = {name: p.grad.clone() for name, p in pair.ours.named_parameters()}
    pair.ours.zero_grad()
    for ids, w in zip(docs, weight.split(lengths), strict=True):
        (pair.logits(Packed.of([ids])) * w).sum().backward()
    for name, parameter in pair.ours.named_parameters():
        assert relative(packed[name], parameter.grad) <= 1e-4, name


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_equals_the_reference_s_padded_batch(pair: Twins, side: str) -> None:
    lengths = (70, 33, 5)
    docs = documents(*lengths)
    ids, mask = torch.zeros(3, 70, dtype=torch.int64), torch.zeros(3, 70, dtype=torch.int64)
    places = [slice(70 - n, 70) if side == "left" else slice(0, n) for n in lengths]
    for row, (place, document) in enumerate(zip(places, docs, strict=True)):
        ids[row, place], mask[row, place] = document, 1
    with torch.no_grad():
        padded = pair.theirs(ids, attention_mask=mask, use_cache=False).logits
        found = pair.logits(Packed.of(docs)).split(lengths)
    for row, place in enumerate(places):
        assert float((found[row] - padded[row, place]).abs().max()) <= 1e-5


def test_nothing_crosses_a_document_s_start(pair: Twins) -> None:
    first, second = documents(20, 30)
    other = documents(20, seed=9)[0]
    with torch.no_grad():
        one = pair.logits(Packed.of([first, second]))[20:]
        two = pair.logits(Packed.of([other, second]))[20:]
    assert torch.equal(one, two)


def test_an_empty_document_is_nothing(pair: Twins) -> None:
    (ids,) = documents(12)
    positions = torch.cat([torch.arange(5), torch.arange(7)])
    gap = Packed(ids, (0, 5, 5, 12), positions)
    with torch.no_grad():
        plain = pair.logits(Packed(ids, (0, 5, 12), positions))
        assert float((pair.logits(gap) - plain).abs().max()) <= 1e-6


def naive_conv(u: Tensor, weight: Tensor, cu_seqlens: tuple[int, ...]) -> Tensor:
    out = []
    for n in range(len(cu_seqlens) - 1):
        document = u[cu_seqlens[n] : cu_seqlens[n + 1]]
        for t in range(len(document)):
            taps = range(max(0, t - 3), t + 1)
            out.append(sum(document[i] * weight[:, 0, 3 - (t - i)] for i in taps))
    return F.silu(torch.stack(out))


@pytest.mark.parametrize("cu_seqlens", [(0, 1), (0, 2, 3, 10), (0, 7), (0, 4, 8, 9)])
def test_convolution_and_its_gradients(cu_seqlens: tuple[int, ...]) -> None:
    u = torch.randn(cu_seqlens[-1], 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 1, 4, dtype=torch.float64, requires_grad=True)
    found, wanted = causal_conv_silu(u, weight, cu_seqlens), naive_conv(u, weight, cu_seqlens)
    assert torch.allclose(found, wanted, atol=1e-12)
    scale = torch.randn_like(wanted)
    mine = torch.autograd.grad((found * scale).sum(), [u, weight])
    theirs = torch.autograd.grad((wanted * scale).sum(), [u, weight])
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[int, ...], scale: float
) -> Tensor:
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    document = torch.bucketize(torch.arange(len(q)), torch.tensor(cu_seqlens[1:]), right=True)
    allowed = (document[:, None] == document[None]).tril()
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~allowed, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("cu_seqlens", [(0, 17), (0, 4, 8, 12, 17), (0, 1, 2, 9, 9, 16)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_varlen_attention(cu_seqlens: tuple[int, ...], kv_heads: int) -> None:
    tokens = cu_seqlens[-1]
    q = torch.randn(tokens, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(tokens, kv_heads, 8, dtype=torch.float64).requires_grad_() for _ in "kv")
    found = varlen_attention(q, k, v, cu_seqlens, 0.3)
    wanted = masked_attention(q, k, v, cu_seqlens, 0.3)
    assert torch.allclose(found, wanted, atol=1e-12)
    scale = torch.randn_like(wanted)
    mine = torch.autograd.grad((found * scale).sum(), [q, k, v])
    theirs = torch.autograd.grad((wanted * scale).sum(), [q, k, v])
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize(("new", "total"), [(1, 1), (1, 9), (9, 9), (4, 9)])
def test_cached_attention(new: int, total: int) -> None:
    q = torch.randn(total, 4, 8)
    k, v = torch.randn(total, 2, 8), torch.randn(total, 2, 8)
    wanted = masked_attention(q, k, v, (0, total), 0.3)[total - new :]
    assert torch.allclose(cached_attention(q[total - new :], k, v, 0.3), wanted, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_memory_is_linear_in_tokens(dtype: torch.dtype) -> None:
    """No tensor of T x T, forward or backward: the fused kernel serves grouped heads of 256."""

    def run(tokens: int) -> Written:
        q = torch.randn(tokens, 4, 256, dtype=dtype, requires_grad=True)
        k, v = (torch.randn(tokens, 1, 256, dtype=dtype).requires_grad_() for _ in "kv")
        with Written() as written:
            varlen_attention(q, k, v, (0, tokens), 0.1).sum().backward()
        return written

    small, large = run(300), run(600)
    assert large.elements / small.elements < 2.05
    assert any("flash" in name for name in large.names)
