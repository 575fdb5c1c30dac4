"""Live bytes and work, against numbers by hand."""

from __future__ import annotations

import pytest
import torch

from qcore.nn.kernels.launch import PlannedDevice, device_type, launch, on_gpu, planning
from qcore.planning.trace import Trace

KB = 1024


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_bytes_are_those_of_storages_that_somebody_holds(device: str) -> None:
    before = torch.empty(KB, device=device)
    with Trace(device) as trace:
        a = torch.empty(KB, device=device)  # 4 KiB
        view = a.view(2, -1).t()[1:]
        b = a + before  # 4 KiB
        a.mul_(2)
        assert trace.live == 8 * KB
        del a
        assert trace.live == 8 * KB, "a view holds it"
        del view
        assert (trace.live, trace.peak) == (4 * KB, 8 * KB)
        one = b.sum()  # 4 bytes, as the allocator rounds
        assert trace.live == 4 * KB + 512
        assert before.t() is not None
        del one, b
    assert trace.live == 0


def test_a_peak_is_of_what_came_since_the_mark() -> None:
    with Trace("meta") as trace:
        a = torch.empty(4 * KB, device="meta")
        del a
        trace.mark()
        assert trace.peak == 0
        b = torch.zeros(KB, device="meta")
    assert trace.peak == 4 * KB
    assert [(one.name, one.nbytes) for one in trace.work] == [("zeros", 4 * KB)]
    del b


def test_work_of_products() -> None:
    a, b = torch.empty(8, 16, device="meta"), torch.empty(16, 4, device="meta")
    c, d = torch.empty(3, 8, 16, device="meta"), torch.empty(3, 16, 4, device="meta")
    bias = torch.empty(8, 4, device="meta", dtype=torch.float32)
    with Trace("meta") as trace:
        torch.mm(a, b)
        torch.addmm(bias, a, b)
        torch.bmm(c, d)
        a.t()
        torch.empty_like(a)
        torch.zeros_like(a)
        a.relu_()
    flops = [one.flops for one in trace.work]
    assert flops == [2 * 8 * 16 * 4, 2 * 8 * 16 * 4, 3 * 2 * 8 * 16 * 4, 0, 0]
    assert trace.work[0].nbytes == 4 * (8 * 16 + 16 * 4 + 8 * 4)
    assert trace.work[0].wide
    assert trace.work[3].nbytes == 4 * 8 * 16, "zeros_like reads nothing"


def test_kernels_are_told_and_not_started() -> None:
    def kernel() -> None:
        raise AssertionError

    kernels = []
    x = torch.empty(4, device="meta")
    launch(kernel, (1,), x)  # nobody plans: nothing happens
    with planning(PlannedDevice(device="cuda", record=lambda *one: kernels.append(one))):
        launch(kernel, (1,), x, 3, flops=100.0, share=0.5)
        launch(kernel, (0,), x)
        assert on_gpu(x)
        assert device_type(x.device) == "cuda"
        assert device_type(torch.device("cpu")) == "cpu"
    assert [(name, flops) for name, _, flops in kernels] == [("kernel", 200.0)]
    assert not on_gpu(x)


def test_allocations_have_owners_backwards_too() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x * 2

        @staticmethod
        def backward(ctx, dy):  # type: ignore[no-untyped-def]
            return dy * 2

    with Trace("meta") as trace:
        x = torch.empty(KB, device="meta", requires_grad=True)
        y = trace.named("double", Double.apply)(x)
        assert trace.live_by_op["double"] == 4 * KB
        trace.mark()
        y.backward(torch.empty(KB, device="meta"))
        assert trace.peak_by_op["double"] == 8 * KB
