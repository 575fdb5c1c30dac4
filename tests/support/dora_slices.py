"""DoRA on a slice of a published shape: qcore's gradients, stock PEFT's, and timed steps.

`gradient_slices` has the model and its values, `gradient_cases` the documents. PEFT's layers lie on
transformers' own class with the weights that qcore holds, read back from 4 bit.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from support.e2e_kit import wrapped
from support.gradient_cases import VOCABULARY, Case, Gradients
from support.gradient_slices import Slice
from support.gradient_twin import _theirs, fresh_model

from qcore.api.blocks import Packed

SIDES = ("lora_A", "lora_B", "lora_magnitude_vector")


@torch.no_grad()
def move_magnitudes(ours: Slice, seed: int = 4) -> None:
    """Give each m values as if trained; the optimizer's vector holds it."""
    draw = torch.Generator().manual_seed(seed)
    for _, module in ours.model.adapters():
        m = module.lora_magnitude_vector
        assert m is not None
        m.mul_((1 + 0.2 * torch.randn(m.shape, generator=draw)).to(m.device))


def our_gradients(ours: Slice, case: Case, policy: str) -> Gradients:
    """Of the mean loss over targets, by weight and parameter."""
    ours.gradients(case, policy=policy)
    found = {}
    for name, module in ours.model.adapters():
        for side, factor in zip(SIDES, module.factors, strict=True):
            assert factor.grad is not None
            found[f"{name} {side}"] = factor.grad.detach().float().clone()
    return found


def pefts_gradients(ours: Slice, case: Case, dtype: torch.dtype) -> Gradients:
    """The same of stock PEFT, in `dtype`: bfloat16 under autocast, with float32 adapters."""
    names = [name for name, _ in ours.model.adapters()]
    modules = [_theirs(name).removesuffix(".weight") for name in names]
    options: dict[str, Any] = {"target_modules": modules, "r": 8, "lora_alpha": 16}
    peer = wrapped(fresh_model(ours, dtype), use_dora=True, **options).train()
    layers = dict(peer.named_modules())
    found = {}
    for name, module in ours.model.adapters():
        layer = layers[f"base_model.model.{_theirs(name).removesuffix('.weight')}"]
        for side, factor in zip(SIDES, module.factors, strict=True):
            theirs = getattr(layer, side)["default"].weight
            assert theirs.dtype == torch.float32
            theirs.data = factor.detach().clone()
            found[f"{name} {side}"] = theirs
    count = sum(int((want >= 0).sum()) for _, want in case.rows())
    with torch.autocast(ours.device.type, dtype) if dtype != torch.float32 else nullcontext():
        for ids, want in case.rows():
            logits = peer(input_ids=ids.to(ours.device)[None], use_cache=False).logits[0].float()
            loss = F.cross_entropy(logits, want.to(ours.device), reduction="sum", ignore_index=-100)
            (loss / count).backward()
    return {name: parameter.grad for name, parameter in found.items()}


def error(found: Gradients, expected: Gradients, side: str) -> float:
    """Relative error of all gradients of one kind of parameter together."""
    names = [name for name in expected if name.endswith(side)]
    gap = sum(float((found[name] - expected[name]).square().sum()) for name in names)
    return float((gap / sum(float(expected[name].square().sum()) for name in names)) ** 0.5)


def seconds_of_steps(ours: Slice, tokens: int, policy: str, steps: int = 12) -> float:
    """Median time of an optimizer step over one pack, after two that warm up."""
    ids = torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(1))
    batch = Packed.of([ids], [ids.roll(-1)]).to(ours.device)
    times = []
    for _ in range(steps + 2):
        if ours.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        (ours.model.loss(batch, recompute=policy) / tokens).backward()
        ours.optimizer.clip(1.0)
        ours.optimizer.step()
        ours.optimizer.zero_grad()
        if ours.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[2:])[steps // 2]
