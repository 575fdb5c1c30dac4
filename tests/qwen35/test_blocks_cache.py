"""Decoding with a cache equals the full forward, however the document is cut."""

from __future__ import annotations

import inspect

import pytest
import torch
from support.blocks_kit import Twins, documents, relative, tiny_config, twins
from torch import Tensor
from transformers import Qwen3_5ForCausalLM

from qcore.api.blocks import Packed
from qcore_qwen35.attention import KvCache
from qcore_qwen35.delta import DeltaCache

#: transformers 5.24 renamed ``past_key_values`` to ``cache``.
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(Qwen3_5ForCausalLM.forward).parameters
)

CUTS = {
    "token by token": [1] * 12,
    "prefill then decode": [70, 1, 1, 1],
    "pieces": [2, 64, 1, 65, 3],
    "short first piece": [1, 2, 3, 30],
    "one piece": [67],
}


@pytest.fixture(scope="module")
def pair() -> Twins:
    return twins(tiny_config())


def in_pieces(pair: Twins, ids: Tensor, sizes: list[int]) -> tuple[Tensor, list[object]]:
    caches = [layer.new_cache(len(ids), torch.device("cpu")) for layer in pair.ours.layers]
    out, start = [], 0
    for size in sizes:
        piece = slice(start, start + size)
        batch = Packed(ids[piece], (0, size), torch.arange(start, start + size))
        out.append(pair.logits(batch, caches=caches))
        start += size
    return torch.cat(out), caches


@pytest.mark.parametrize("sizes", CUTS.values(), ids=CUTS)
def test_pieces_equal_the_whole(pair: Twins, sizes: list[int]) -> None:
    (ids,) = documents(sum(sizes))
    with torch.no_grad():
        found, _ = in_pieces(pair, ids, sizes)
        assert float((found - pair.reference(ids)).abs().max()) <= 1e-5
        assert float((found - pair.logits(Packed.of([ids]))).abs().max()) <= 1e-5


def test_state_equals_the_reference_s(pair: Twins) -> None:
    """Both cached states after 70 + 1 tokens, in the reference's own shapes."""
    (ids,) = documents(71)
    with torch.no_grad():
        _, caches = in_pieces(pair, ids, [70, 1])
        first = pair.theirs(ids[None, :70], use_cache=True)
        theirs = pair.theirs(ids[None, 70:], **{CACHE: first[CACHE]})[CACHE]
    for number, cache in enumerate(caches):
        if isinstance(cache, DeltaCache):
            layer = theirs.layers[number]
            assert relative(cache.conv.t(), layer.conv_states[0][0]) <= 1e-5
            assert relative(cache.state, layer.recurrent_states[0]) <= 1e-5
        else:
            assert isinstance(cache, KvCache)
            assert cache.length == 71
            keys = theirs.layers[number].keys[0].transpose(0, 1)
            assert relative(cache.k[:71], keys) <= 1e-5


def test_a_short_document_leaves_zeros_before_its_start(pair: Twins) -> None:
    (ids,) = documents(2)
    with torch.no_grad():
        _, caches = in_pieces(pair, ids, [2])
    assert not caches[0].conv[:2].any()
    assert caches[0].conv[2:].any()


def test_state_is_float32_in_a_bfloat16_model() -> None:
    pair = twins(tiny_config(), dtype=torch.bfloat16)
    (ids,) = documents(9)
    with torch.no_grad():
        found, caches = in_pieces(pair, ids, [7, 1, 1])
        whole = pair.logits(Packed.of([ids]))
    assert caches[0].state.dtype is torch.float32
    assert caches[0].conv.dtype is torch.bfloat16
    assert caches[3].k.dtype is torch.bfloat16
    assert relative(found.float(), whole.float()) <= 0.03


def test_a_full_cache_says_so(pair: Twins) -> None:
    cache = pair.ours.layers[3].new_cache(3, torch.device("cpu"))
    k = torch.zeros(2, 2, 32)
    cache.extend(k, k)
    with pytest.raises(ValueError, match="3 tokens cannot hold 4"):
        cache.extend(k, k)
