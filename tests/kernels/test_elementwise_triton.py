"""The elementwise kernels, interpreted: outputs and gradients against the references.

float16 stands for bfloat16, to which the interpreter cuts off where cards round; bfloat16 is in
tests/gpu/test_elementwise_kernels.py.
"""

from __future__ import annotations

import pytest
import torch
from support.elementwise_kit import cases, error, gradients, outputs, poisoned
from support.tiers import fast

LENGTHS = [(1,), (2, 1, 3), (35,), (1, 40, 2, 0, 7)]
NAMES = list(cases((1,), device="cpu", dtype=torch.float32))


@pytest.mark.parametrize("lengths", fast(LENGTHS, (2, 1, 3)))
@pytest.mark.parametrize("name", NAMES)
def test_float32_equals_the_reference(name: str, lengths: tuple[int, ...]) -> None:
    case = cases(lengths, device="cpu", dtype=torch.float32)[name]
    wanted = gradients(case, case.reference, case.tensors, 1)
    with poisoned():
        found = gradients(case, case.kernel(), case.tensors, 1)
    for mine, theirs in zip(found, wanted, strict=True):
        for number, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            assert one.dtype == other.dtype
            assert one.shape == other.shape
            assert error(one, other) < 2e-6, number


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_half_errs_no_more_than_the_reference(name: str) -> None:
    case = cases((1, 40, 2, 7), device="cpu", dtype=torch.float16)[name]
    wide = [one.float() for one in case.tensors]
    exact = gradients(case, case.reference, wide, 1)
    theirs = gradients(case, case.reference, case.tensors, 1)
    with poisoned():
        mine = gradients(case, case.kernel(), case.tensors, 1)
    for kind, (found, half, single) in enumerate(zip(mine, theirs, exact, strict=True)):
        for number, (one, two, three) in enumerate(zip(found, half, single, strict=True)):
            assert one.dtype == two.dtype
            assert error(one, three) <= 1.05 * error(two, three) + 1e-6, (kind, number)


@pytest.mark.parametrize("name", NAMES)
def test_half_rounds_where_the_reference_does(name: str) -> None:
    case = cases((33, 9), device="cpu", dtype=torch.float16)[name]
    found = outputs(case, case.kernel(), case.tensors)
    for one, other in zip(found, outputs(case, case.reference, case.tensors), strict=True):
        if one.dtype == torch.float16:
            assert float((one == other).float().mean()) > 0.995


STACKS = {
    "delta_inputs": range(4), "attention_inputs": range(3), "swiglu": range(2),
}  # fmt: skip


@pytest.mark.parametrize("name", STACKS)
def test_gradients_of_a_stack_are_one_buffer(name: str) -> None:
    from qcore.nn.grad_buffers import as_one_buffer

    case = cases((5, 6), device="cpu", dtype=torch.float32)[name]
    base = torch.cat([case.tensors[i] for i in STACKS[name]], 1)
    seen = []

    class Stack(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return tuple(x.clone().split([case.tensors[i].shape[1] for i in STACKS[name]], 1))

        @staticmethod
        def backward(ctx, *grads):
            made = as_one_buffer(grads)
            seen.append(made.data_ptr() == grads[0].data_ptr())
            return made

    results = []
    for function in (case.kernel(), case.reference):
        x = base.clone().requires_grad_()
        rest = case.tensors[len(STACKS[name]) :]
        made = outputs(case, function, [*Stack.apply(x), *rest])
        if name != "swiglu":  # what stands behind: the gated norm, the output gate
            made[-1] = made[-1] * torch.linspace(0, 1, made[-1].numel()).view(made[-1].shape)
        torch.autograd.backward(sum((one.float() ** 2).sum() for one in made))
        results.append(x.grad)
    assert error(results[0], results[1]) < 2e-6
    assert seen[0]


def test_the_gates_gradient_is_where_attentions_inputs_want_it() -> None:
    """Block order: gate behind attention, its gradient first; one buffer, nothing copied."""
    from qcore_qwen35.ops.attention import triton as kernels

    case = cases((7,), device="cpu", dtype=torch.float32)["attention_inputs"]
    base = torch.cat(case.tensors[:3], 1).requires_grad_()
    widths = [one.shape[1] for one in case.tensors[:3]]
    pointers = {}

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, name):
            ctx.name = name
            return x.view_as(x)

        @staticmethod
        def backward(ctx, dx):
            pointers[ctx.name] = dx.untyped_storage().data_ptr()
            return dx, None

    qg, k, v = (Watch.apply(x, n) for x, n in zip(base.split(widths, 1), ("qg", "k", "v")))
    made = case.call(kernels.attention_inputs, [qg, k, v, *case.tensors[3:]])
    y = kernels.output_gate(made.q.tanh(), Watch.apply(made.gate, "gate"))
    (y.sum() + made.k.square().sum() + made.v.sum()).backward()
    assert len(set(pointers.values())) == 1


def test_frozen_weights_get_no_gradient_and_no_work() -> None:
    for name, frozen in {"rms_norm": 1, "add_rms_norm": 2, "gated_norm": 2}.items():
        case = cases((4,), device="cpu", dtype=torch.float32)[name]
        leaves = [x.detach().requires_grad_(i != frozen) for i, x in enumerate(case.tensors)]
        outputs(case, case.kernel(), leaves)[-1].sum().backward()
        assert leaves[frozen].grad is None
        assert all(x.grad is not None for i, x in enumerate(leaves) if i != frozen)
