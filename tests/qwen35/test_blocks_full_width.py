"""Four layers of every dense checkpoint at full width, from its real config, in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.blocks_kit import documents, relative, twins
from support.child import in_child

from qcore.api.blocks import Packed

VOCAB = 512
TOKENS = 70
#: Maps above this many elements are frozen: their gradients alone would be gigabytes, and are
#: torch's product of two tensors that the input's gradient already proves.
TRAINED = 2**20

SKUS = [
    "qwen3.5/Qwen3.5-0.8B",
    "qwen3.5/Qwen3.5-2B",
    "qwen3.5/Qwen3.5-4B",
    "qwen3.5/Qwen3.5-9B",
    "qwen3.5/Qwen3.5-27B",
]


def slice_of(config: dict[str, Any]) -> dict[str, Any]:
    """The first four layers, a short vocabulary with a head of its own."""
    text = dict(config["text_config"])
    text.update(
        num_hidden_layers=4, layer_types=text["layer_types"][:4], vocab_size=VOCAB,
        tie_word_embeddings=False, eos_token_id=1,
    )  # fmt: skip
    assert text["layer_types"] == ["linear_attention"] * 3 + ["full_attention"]
    return text


@pytest.mark.parametrize("sku", SKUS)
@pytest.mark.slow
@in_child
def test_four_layers_at_full_width(shared: Path, sku: str) -> None:
    config = json.loads((shared / "skus" / sku / "config.json").read_text(encoding="utf-8"))
    pair = twins(slice_of(config), attention="sdpa")
    for parameter in (*pair.theirs.parameters(), *pair.ours.parameters()):
        parameter.requires_grad_(parameter.numel() <= TRAINED)
    (ids,) = documents(TOKENS, vocab=VOCAB)
    batch = Packed.of([ids])
    weights = torch.randn(TOKENS, VOCAB, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        embedded = pair.ours.embed(batch)
    mine, other = embedded.clone().requires_grad_(), embedded.clone().requires_grad_()
    found = pair.logits(batch, mine)
    (found * weights).sum().backward()
    wanted = pair.theirs(inputs_embeds=other[None], use_cache=False).logits[0]
    (wanted * weights).sum().backward()
    assert relative(found, wanted) <= 1e-5
    assert relative(mine.grad, other.grad) <= 1e-4
    theirs = dict(pair.theirs.model.named_parameters())
    compared = 0
    for name, parameter in pair.ours.named_parameters():
        if parameter.requires_grad and name != "embed_tokens.weight":
            assert relative(parameter.grad, theirs[name].grad) <= 1e-4, name
            compared += 1
    assert compared >= 3 * 8 + 4 + 1  # norms, conv, gates and state of three layers, and more
