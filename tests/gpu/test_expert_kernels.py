"""Experts' kernels on a card: errors against float32, full width, the same bits twice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("triton")


def test_every_check_passes() -> None:
    from qcore.nn.moe import triton as experts_triton
    from qcore.nn.moe import triton_routing as experts_triton_routing
    from qcore_qwen35.ops.verify import CASES, verify

    assert experts_triton.verify(CUDA).good
    assert experts_triton_routing.verify(CUDA).good
    for op in CASES:
        if op.startswith("moe_"):
            assert verify(op, CUDA).good, op


@pytest.mark.parametrize("r", [3, 8, 40])
@pytest.mark.parametrize("tokens", [1, 515, 4099])
@pytest.mark.parametrize("spread", ["in", "out"])
def test_the_map_errs_no_more_than_torch(tokens: int, r: int, spread: str) -> None:
    """Against float64; most experts have no row with one token."""
    from qcore.nn.moe import experts
    from qcore.nn.moe import triton as experts_triton
    from qcore.nn.moe.experts import Experts, Routing
    from qcore.nn.qlora.lora_layer import Lora

    shape = (32, 640, 512)
    generator = torch.Generator().manual_seed(r)
    value = torch.randn(shape, generator=generator) / 512**0.5
    half = Experts(shape, torch.bfloat16, Lora(r=r, lora_alpha=2 * r))
    half.hold(slice(0, 32), value.to(CUDA), quantize=True, dtype=torch.bfloat16)
    wide = Experts(shape, torch.float64, half.lora)
    wide.hold(slice(0, 32), half.dense_slices(slice(0, 32)), quantize=False, dtype=torch.float64)
    a, b = (torch.randn(s, generator=generator).to(CUDA) * 0.1 for s in half.lora_shapes(r))
    chosen = torch.rand(tokens, 31, generator=generator).topk(4, 1).indices.to(CUDA)
    routing = Routing.of(chosen, 32)
    rows = tokens * 4
    x = torch.randn(tokens if spread == "in" else rows, 512, generator=generator).to(CUDA)
    dy = torch.randn(tokens if spread == "out" else rows, 640, generator=generator).to(CUDA)
    x, dy = x.bfloat16(), dy.bfloat16()

    def run(compute: object, module: Experts) -> list[Tensor]:
        module.set_lora(a.to(torch.float64) if module is wide else a, b.to(
            torch.float64) if module is wide else b, trained=True)  # fmt: skip
        given = x.to(module.dense_slices(slice(0, 1)).dtype).requires_grad_()
        held = [torch.full((1 << 26,), float("nan"), device=CUDA) for _ in range(4)]
        del held
        y = compute(given, module, routing, spread)  # type: ignore[operator]
        y.backward(dy.to(y.dtype))
        found = (y.detach(), given.grad, module.lora_A, module.lora_B)
        return [
            one.grad if isinstance(one, torch.nn.Parameter) else one
            for one in found if one is not None
        ]  # type: ignore[misc]  # fmt: skip

    expected = run(experts.grouped, wide)
    torch_, mine = run(experts.grouped, half), run(experts_triton.grouped, half)
    for want, theirs, ours in zip(expected, torch_, mine, strict=True):
        off = [float((g.double() - want).norm() / want.norm()) for g in (theirs, ours)]
        assert off[1] <= max(1.1 * off[0], 4e-3), off
    again = run(experts_triton.grouped, half)
    assert all(torch.equal(one, two) for one, two in zip(mine, again, strict=True))
