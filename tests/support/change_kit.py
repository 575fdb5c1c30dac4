"""Adapters of stock PEFT with DoRA, heads, embeddings and saved modules, and PEFT's own merges."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from support.e2e_kit import PREFIX, ROOT, stock
from torch import Tensor


def written(
    base: Path, folder: Path, recipe: Mapping[str, Any], *, kind: str = "vl", seed: int = 2,
    edit: Callable[[Any], object] | None = None, save: Mapping[str, Any] | None = None,
    moe: bool = False, rows: int = 0,
) -> Any:  # fmt: skip
    """A stock adapter on the base in float32, every trained tensor random, saved by PEFT.

    With `rows`, embedding and head of the base are resized to so many rows first.
    """
    options: dict[str, Any] = {"r": 4, "lora_alpha": 6} | dict(recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = stock(base, kind, torch.float32, moe=moe)
        if rows:
            plain.resize_token_embeddings(rows)
        model = peft.get_peft_model(plain, peft.LoraConfig(**options))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if "magnitude" in name:
                    parameter.mul_(1 + 0.2 * noise)
                elif "lora_" in name:
                    parameter.copy_(0.1 * noise)
                elif parameter.requires_grad:
                    parameter.add_(0.05 * noise)
        if edit is not None:
            edit(model)
        model.save_pretrained(str(folder), **(save or {"save_embedding_layers": False}))
    return model.eval()


def canonical(name: str, kind: str) -> str:
    """The name on the hub of a tensor of a stock class."""
    return name if kind == "vl" else name.replace(PREFIX[kind], ROOT, 1)


def on_disk(folder: Path, kind: str = "vl") -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its canonical name."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= {canonical(name, kind): value for name, value in load_file(file).items()}
    return found


def step(value: Tensor) -> Tensor:
    """The distance of neighbors in bfloat16 at each element."""
    return torch.exp2(torch.frexp(value.abs().clamp_min(1e-30)).exponent.float() - 8)


def vocabulary_weights(model: Any) -> dict[str, Tensor]:
    """Embedding and head as a PEFT model computes with them, by canonical name."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    with torch.no_grad():
        size, width = embedding.weight.shape
        return {
            f"{ROOT}embed_tokens.weight": embedding(torch.arange(size)),
            "lm_head.weight": head(torch.eye(width)).T.contiguous(),
        }


def assert_merged(
    model: Any, base: Path, out: Path, *, kind: str = "vl", untied: bool = False
) -> set[str]:
    """Compare a merge with PEFT's own in float32; returns the names of the tensors that changed.

    Every element is within one step of bfloat16, and what PEFT does not change is the base's. PEFT
    merges the changes of embedding and head into one weight if they are tied. So both are compared
    with what the PEFT model computes, and `untied` says that the merge must have a head of its own.
    """
    live = vocabulary_weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = {canonical(n, kind): v for n, v in model.merge_and_unload().state_dict().items()}
    theirs |= live
    before, mine, changed = on_disk(base, kind), on_disk(out, kind), set()
    for name in before.keys() & live.keys():
        if len(live[name]) > len(before[name]):  # rows that the adapter adds
            larger = torch.zeros(live[name].shape, dtype=before[name].dtype)
            larger[: len(before[name])] = before[name]
            before[name] = larger
    if untied:
        before["lm_head.weight"] = before[f"{ROOT}embed_tokens.weight"]
    elif "lm_head.weight" not in before:
        close = (live["lm_head.weight"] - live[f"{ROOT}embed_tokens.weight"]).abs().max()
        assert float(close) <= 1e-6
    assert mine.keys() == before.keys()
    for name, value in ((name, value.float()) for name, value in theirs.items()):
        if name not in before:
            continue  # a tied head
        assert mine[name].dtype == before[name].dtype
        if float((value - before[name].float()).abs().max()) <= 1e-6 * float(value.abs().max()):
            assert torch.equal(mine[name], before[name]), name
            continue
        changed.add(name)
        # PEFT adds in float32, whose rounding shows where the sum cancels.
        allowed = step(value) + 2**-23 * value.abs().max()
        assert bool(((mine[name].float() - value).abs() <= allowed).all()), name
    untouched = before.keys() - changed
    assert all(torch.equal(mine[name], before[name]) for name in untouched)
    return changed
