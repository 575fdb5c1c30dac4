"""One case for each elementwise op: inputs laid out as in a model, the reference, the kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcore_qwen35.ops.attention import reference as attention
from qcore_qwen35.ops.delta_inputs import reference as delta
from qcore_qwen35.ops.norm import reference as norm
from qcore_qwen35.ops.swiglu import reference as swiglu

Function = Callable[..., Any]


@dataclass
class Case:
    """Tensors, how they make the call, and how many of them (the last) are weights."""

    tensors: list[Tensor]
    call: Callable[[Function, list[Tensor]], Any]
    reference: Function
    module: str
    name: str
    weights: int = 0

    def kernel(self) -> Function:
        module = __import__(f"qcore_qwen35.ops.{self.module}.triton", fromlist=[self.name])
        return getattr(module, self.name)


def stacked(tokens: int, *widths: int, draw: Callable[..., Tensor]) -> list[Tensor]:
    """Column slices of one buffer."""
    return list(draw(tokens, sum(widths)).split(widths, 1))


def cases(
    lengths: tuple[int, ...], *, device: str, dtype: torch.dtype, big: bool = False, seed: int = 0
) -> dict[str, Case]:
    """By op; `big` are a 9B's sizes, else small and odd ones."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    tokens = sum(lengths)
    ends = [0]
    for n in lengths:
        ends.append(ends[-1] + n)
    hidden, inner = (4096, 12288) if big else (50, 70)
    heads = delta.Heads(16, 128, 32, 128) if big else delta.Heads(2, 20, 4, 24)
    q_heads, kv_heads, d, turning = (16, 4, 256, 64) if big else (3, 2, 40, 16)
    documents = delta.Documents.of(ends, torch.device(device))
    keys, values = heads.k_heads * heads.k_dim, heads.v_heads * heads.v_dim
    angles = torch.randn(tokens, 1, turning // 2, generator=generator, device=device)
    angles = torch.cat((angles, angles), -1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    o, z = draw(tokens, heads.v_heads, heads.v_dim), stacked(tokens, 8, values, draw=draw)[1]
    qkv, z2, a, b = stacked(
        tokens, 2 * keys + values, values, heads.v_heads, heads.v_heads, draw=draw
    )
    conv = 0.5 * draw(2 * keys + values, 1, 4)
    log, bias = draw(heads.v_heads).float() - 1, draw(heads.v_heads)
    qg, k, v = stacked(tokens, q_heads * 2 * d, kv_heads * d, kv_heads * d, draw=draw)
    qw, kw = 0.3 * draw(d), 0.3 * draw(d)
    oa = draw(tokens, q_heads, d)
    gate_, up = stacked(tokens, inner, inner, draw=draw)
    eps = 1e-6

    def gates(f: Function, t: list[Tensor]) -> Any:
        return f(t[0], t[1].view(tokens, q_heads, 2 * d)[..., d:])

    made = {
        "rms_norm": Case(
            [draw(tokens, hidden), 0.3 * draw(hidden)],
            lambda f, t: f(t[0], t[1], eps), norm.rms_norm, "norm", "rms_norm", 1,
        ),
        "add_rms_norm": Case(
            [draw(tokens, hidden), draw(tokens, hidden), 0.3 * draw(hidden)],
            lambda f, t: f(t[0], t[1], t[2], eps), norm.add_rms_norm, "norm", "add_rms_norm", 1,
        ),
        "rms_norm and residual": Case(
            [draw(tokens, hidden), 0.3 * draw(hidden)],
            lambda f, t: f(t[0], None, t[1], eps), norm.add_rms_norm, "norm", "add_rms_norm", 1,
        ),
        "gated_norm": Case(
            [o, z, 1 + 0.3 * draw(heads.v_dim)],
            lambda f, t: f(t[0], t[1].unflatten(-1, (heads.v_heads, heads.v_dim)), t[2], eps),
            norm.gated_norm, "norm", "gated_norm", 1,
        ),
        "delta_inputs": Case(
            [qkv, z2, a, b, conv, log, bias],
            lambda f, t: f(*t, documents, heads), delta.delta_inputs, "delta_inputs",
            "delta_inputs", 3,
        ),
        "attention_inputs": Case(
            [qg, k, v, qw, kw],
            lambda f, t: f(*t, eps, cos, sin), attention.attention_inputs, "attention",
            "attention_inputs", 2,
        ),
        "output_gate": Case([oa, qg.clone()], gates, attention.output_gate, "attention",
            "output_gate",
        ),
        "swiglu": Case(
            [gate_, up], lambda f, t: f(*t), swiglu.swiglu, "swiglu", "swiglu",
        ),
    }  # fmt: skip
    return made


def outputs(case: Case, function: Function, tensors: list[Tensor]) -> list[Tensor]:
    found = case.call(function, tensors)
    return [found] if isinstance(found, Tensor) else list(found)


def gradients(
    case: Case, function: Function, tensors: list[Tensor], seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients under random weights, the same for every call with a seed."""
    leaves = [one.detach().requires_grad_() for one in tensors]
    made = outputs(case, function, leaves)
    generator = torch.Generator(made[0].device).manual_seed(seed)
    weights = [
        torch.randn(one.shape, generator=generator, device=one.device).to(torch.bfloat16)
        for one in made
    ]
    grads = torch.autograd.grad(made, leaves, [w.to(o.dtype) for w, o in zip(weights, made)])
    return [one.detach() for one in made], list(grads)


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative; NaN is infinitely wrong."""
    found, wanted = found.double(), wanted.double()
    value = float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
    return value if value == value else float("inf")


@contextmanager
def poisoned() -> Iterator[None]:
    """What is not initialised is NaN."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
