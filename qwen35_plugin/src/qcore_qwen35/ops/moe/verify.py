"""How far the backends of a mixture's ops may be from their references.

This file decides the inputs and bounds: odd numbers of tokens, a number of experts that is no
power of two, column slices. Which experts a router picks must be the same: scores of the check
lie apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcore.nn.experts import Routing
from qcore.nn.verify import compare, worst
from qcore.records import Verdict

from . import reference

OUTPUT, GRADIENT = 4e-3, 8e-3
OPS = ("moe_router", "moe_weighted_up", "moe_shared_up")


def verify(op: str, device: torch.device) -> Verdict:
    """Measure the Triton backend of one of `OPS`."""
    from . import triton

    checks = {
        "moe_router": _router,
        "moe_weighted_up": _weighted_up,
        "moe_shared_up": _shared_up,
    }
    return checks[op](triton, device)


def _router(triton: Any, device: torch.device) -> Verdict:
    from ...moe import router

    verdicts = []
    for tokens, experts, k in ((517, 256, 8), (1, 60, 4), (37, 7, 1)):
        generator = torch.Generator().manual_seed(tokens)
        ranks = torch.rand(tokens, experts, generator=generator).argsort(1)
        # No two scores of a token are alike in bfloat16, and few are far below the best.
        scores = (ranks / 64).to(torch.bfloat16) if experts > 64 else (ranks / 16).bfloat16()
        verdicts.append(
            compare(
                lambda s, k=k: _picked(triton.router(s, k)),
                lambda s, k=k: _picked(router(s, k)),
                [scores.to(device)],
                output=OUTPUT,
                gradient=GRADIENT,
            )
        )
    return worst(*verdicts)


def _picked(found: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Experts as numbers that an error shows in."""
    weights, chosen, probability = found
    return weights, chosen.float() + 1, probability


def _weighted_up(triton: Any, device: torch.device) -> Verdict:
    verdicts = []
    for tokens, k, inner in ((117, 8, 512), (5, 2, 24)):
        generator = torch.Generator().manual_seed(tokens)
        chosen = torch.rand(tokens, 16, generator=generator).topk(k, 1).indices
        routing = Routing.of(chosen.to(device), 16)
        gate_up = torch.randn(tokens * k, 2 * inner, generator=generator)
        weights = torch.rand(tokens, k, generator=generator)
        given = [one.to(device, torch.bfloat16) for one in (gate_up, weights)]
        verdicts.append(
            compare(
                triton.weighted_up, reference.weighted_up, [*given, routing], output=OUTPUT,
                gradient=GRADIENT,
            )
        )  # fmt: skip
    return worst(*verdicts)


def _shared_up(triton: Any, device: torch.device) -> Verdict:
    verdicts = []
    for tokens, inner in ((517, 512), (3, 40)):
        generator = torch.Generator().manual_seed(tokens)
        both = torch.randn(tokens, 2 * inner + 8, generator=generator).to(device, torch.bfloat16)
        score = torch.randn(tokens, 1, generator=generator).to(device, torch.bfloat16)
        given = [both[:, :inner], both[:, inner : 2 * inner], score]
        verdicts.append(
            compare(triton.shared_up, reference.shared_up, given, output=OUTPUT, gradient=GRADIENT)
        )
    return worst(*verdicts)
