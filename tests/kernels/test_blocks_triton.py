"""Whole layers on the elementwise kernels, interpreted: gradients, recompute, launches.

The delta rule and attention are the references here; projections are stacked as on a GPU.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from support.blocks_kit import GivenWeights, documents, relative, tiny_config, twins
from torch import Tensor, nn

from qcore.api.blocks import Packed
from qcore.nn.grad_buffers import as_one_buffer
from qcore.nn.recompute import run_layers
from qcore_qwen35.kernels import kernels
from qcore_qwen35.model import Trunk
from qcore_qwen35.ops import TRITON

OURS = {
    "rms_norm", "add_rms_norm", "gated_norm", "swiglu", "delta_inputs", "attention_inputs",
    "output_gate",
}  # fmt: skip


class _Split(torch.autograd.Function):
    """Slices of one buffer, and whether their gradients came back as one."""

    copies = 0

    @staticmethod
    def forward(ctx: Any, y: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        return tuple(y.clone().split(sizes, 1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        made = as_one_buffer(grads)
        _Split.copies += made.data_ptr() != grads[0].data_ptr()
        return made, None


class Fast(GivenWeights):
    """Kernels where there are any, frozen norms, stacked projections."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kernels = {
            one.op: one.load()
            for one in kernels()
            if one.op.removeprefix("qwen35::") in OURS and one.backend == "triton"
        }

    def tensor(self, name: str) -> nn.Parameter:
        return super().tensor(name).requires_grad_(False)

    def stack(self, *linears: nn.Module) -> Any:
        sizes = [one.weight.shape[0] for one in linears]

        def call(x: Tensor) -> tuple[Tensor, ...]:
            return _Split.apply(torch.cat([one(x) for one in linears], 1), sizes)

        return call


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    from importlib import import_module

    count: Counter[str] = Counter()
    for module in {module for op, (module, _) in TRITON.items() if op in OURS}:
        found = import_module(f"qcore_qwen35.ops.{module}")
        real = found.launch

        def launch(kernel: Any, *args: Any, _real: Any = real, **meta: Any) -> None:
            count[kernel.__name__.lstrip("_")] += 1
            _real(kernel, *args, **meta)

        monkeypatch.setattr(found, "launch", launch)
    return count


def run(context: type, policy: str) -> tuple[Tensor, dict[str, Tensor]]:
    pair = twins(tiny_config(layers=["linear_attention", "full_attention"]))
    weights = pair.theirs.model.state_dict()
    trunk = Trunk(context(tiny_config(layers=["linear_attention", "full_attention"]), weights,
                          torch.float32))  # fmt: skip
    batch = Packed.of(documents(1, 40, 26))
    x = trunk.embed(batch).detach().requires_grad_()
    y = trunk.final(run_layers(trunk.layers, x, batch, [policy] * 2))
    y.square().sum().backward()
    grads = {n: p.grad for n, p in trunk.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return y.detach(), {**grads, "x": x.grad}


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["none", "elementwise", "full"])
def test_layers_equal_the_reference(policy: str, counted: Counter[str]) -> None:
    wanted, theirs = run(GivenWeights, "none")
    _Split.copies = 0
    found, mine = run(Fast, policy)
    assert relative(found, wanted) < 1e-5
    assert {n for n in mine if "proj" in n} == {n for n in theirs if "proj" in n}
    for name, gradient in mine.items():
        assert relative(gradient, theirs[name]) < 1e-4, name
    assert _Split.copies == 0


@pytest.mark.slow
def test_launches(counted: Counter[str]) -> None:
    """Two layers and the last norm; under elementwise each cheap result is made once more."""
    run(Fast, "none")
    none = dict(counted)
    assert none == {
        "norm_forward": 5, "norm_backward": 5, "gated_forward": 1, "gated_backward": 1,
        "forward": 4, "backward": 4, "gate_forward": 1, "gate_backward": 1,
    }  # fmt: skip
    counted.clear()
    run(Fast, "elementwise")
    more = {name: counted[name] - none[name] for name in none if counted[name] != none[name]}
    assert more == {
        "norm_forward": 4, "gated_forward": 1, "forward": 4, "gate_forward": 1,
    }  # fmt: skip
