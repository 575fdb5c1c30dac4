"""Times one MoE layer at 35B-A3B sizes on a GPU, kernel by kernel; errors and memory too.

Prints the GPU and versions first, then errors, routing, the layer's time with and without LoRA, and
4-bit weights read inside the product when an expert has few rows. Weights are random, experts in
4 bit; times are medians of device events. ``--tokens`` and ``--r`` (0: experts without LoRA) change
the layer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor, nn

from qcore.api.blocks import Packed
from qcore.nn.moe import triton as experts_triton
from qcore.nn.moe import triton_routing as experts_triton_routing
from qcore.nn.moe.experts import Experts, Routing
from qcore.nn.qlora import nf4, nf4_triton
from qcore.nn.qlora.linear import Linear
from qcore.nn.qlora.lora_layer import Lora, LoraLayer
from qcore.nn.qlora.stacked_linear import Stacked
from qcore.nn.recompute import recompute_cheap
from qcore_qwen35.moe import Moe
from qcore_qwen35.ops.moe import triton as moe_triton
from qcore_qwen35.ops.verify import CASES
from qcore_qwen35.ops.verify import verify as verify_op

CUDA = torch.device("cuda")
H, E, K, INNER = 2048, 256, 8, 512
TEXT = {"num_experts_per_tok": K}
FEW = experts_triton.FEW
SHAPES = {
    "m.gate": (E, H), "m.experts.gate_up_proj": (E, 2 * INNER, H),
    "m.experts.down_proj": (E, H, INNER), "m.shared_expert.gate_proj": (INNER, H),
    "m.shared_expert.up_proj": (INNER, H), "m.shared_expert.down_proj": (H, INNER),
    "m.shared_expert_gate": (1, H),
}  # fmt: skip
KERNELS: dict[str, Any] = {
    "expert_routing": experts_triton_routing.routing_of, "qwen35::moe_router": moe_triton.router,
    "qwen35::moe_weighted_up": moe_triton.weighted_up,
    "qwen35::moe_shared_up": moe_triton.shared_up,
}  # fmt: skip


class Build:
    """A `BuildContext` that fills what it gives with random values."""

    dtype = torch.bfloat16

    def __init__(self, r: int, *, fast: bool) -> None:
        self.r, self.fast = r, fast
        self.generator = torch.Generator(CUDA).manual_seed(0)

    def _fill(self, module: Any, name: str, r: int, *, quantize: bool) -> Any:
        for first in range(0, module.shape[0] if len(module.shape) == 3 else 1, 64):
            count = min(64, module.shape[0]) if len(module.shape) == 3 else module.shape[0]
            shape = (count, *module.shape[1:])
            value = torch.randn(shape, generator=self.generator, device=CUDA) * H**-0.5
            module.hold(
                slice(first, first + count), value.bfloat16(), quantize=quantize, dtype=self.dtype
            )
        if r:
            a, b = module.lora_shapes(r)
            module.set_lora(
                torch.randn(a, generator=self.generator, device=CUDA) * 0.02,
                torch.randn(b, generator=self.generator, device=CUDA) * 0.02, trained=True,
            )  # fmt: skip
        return module

    def linear(self, name: str) -> nn.Module:
        quantize = "gate." not in f"{name}." or "proj" in name
        r = 16 if quantize else 0
        lora = Lora(r=r, lora_alpha=16) if r else None
        read = nf4_triton.dequantize if self.fast else nf4.dequantize
        module = Linear(SHAPES[name], self.dtype, lora, dequantize=read)
        return self._fill(module, name, r, quantize=quantize and "expert_gate" not in name)

    def experts(self, name: str) -> nn.Module:
        lora = Lora(r=self.r, lora_alpha=16) if self.r else None
        module = Experts(
            SHAPES[name], self.dtype, lora,
            dequantize=nf4_triton.dequantize if self.fast else nf4.dequantize,
            compute=experts_triton.grouped if self.fast else None,
        )  # fmt: skip
        return self._fill(module, name, self.r, quantize=True)

    def stack(self, *linears: nn.Module) -> Any:
        return Stacked(linears)  # type: ignore[arg-type]

    def kernel(self, op: str, reference: Any) -> Any:
        if op == "qwen35::swiglu":
            return reference
        return KERNELS[op] if self.fast else reference


def median(run: Callable[[], Any], times: int = 12) -> float:
    for _ in range(3):
        run()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    for start, end in pairs:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def graphed(run: Callable[[], Any]) -> float:
    """Milliseconds of the device alone: the run is replayed as a graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return median(graph.replay)


def host(run: Callable[[], Any], times: int = 10) -> float:
    """Milliseconds of the host alone: runs are asked for and not waited for."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        run()
    spent = time.perf_counter() - began
    torch.cuda.synchronize()
    return 1000 * spent / times


def batch(tokens: int) -> Packed:
    zeros = torch.zeros(tokens, dtype=torch.int64, device=CUDA)
    return Packed(zeros, (0, tokens), zeros)


def step(moe: Moe, x: Tensor, dy: Tensor, packed: Packed) -> Tensor:
    x = x.detach().requires_grad_()
    with recompute_cheap():
        y = moe(x, packed.alone())
    y.backward(dy)
    return y


def parts(run: Callable[[], Any]) -> Iterator[tuple[str, float, int]]:
    """(kernel, ms, launches) of one run, largest first."""
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    total: dict[str, list[float]] = defaultdict(list)
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            total[event.name].append(event.time_range.elapsed_us() / 1000)
    yield from sorted(((n, sum(t), len(t)) for n, t in total.items()), key=lambda one: -one[1])


def block(tokens: int, r: int, *, fast: bool, resident: bool = False, show: bool = False) -> None:
    torch.cuda.empty_cache()
    moe = Moe(Build(r, fast=fast), TEXT, "m")
    for module in (moe.experts.gate_up_proj, moe.experts.down_proj):
        module.resident = resident
    x = torch.randn(tokens, H, device=CUDA).bfloat16()
    dy = torch.randn(tokens, H, device=CUDA).bfloat16() * 1e-3
    packed = batch(tokens)
    for module in moe.modules():
        if isinstance(module, LoraLayer) and module.lora_A is not None:
            # As in a run: gradients are added to what is there by the kernels that make them.
            module.accumulates = True
            for parameter in (module.lora_A, module.lora_B):
                parameter.grad = torch.zeros_like(parameter)

    def whole() -> Tensor:
        return step(moe, x, dy, packed)

    forward = median(lambda: moe(x, packed.alone()))
    both = median(whole)
    asked = host(whole)
    device = graphed(whole) if fast else float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with recompute_cheap():
        y = moe(x.detach().requires_grad_(), batch(tokens))
    kept = torch.cuda.memory_allocated() - before
    y.backward(dy)
    peak = torch.cuda.max_memory_allocated() - before
    del y
    launches = sum(n for _, _, n in parts(whole))
    print(
        f"block {tokens} tokens r={r} {'triton' if fast else 'torch'}{' resident' * resident}: "
        f"forward {forward:.2f} ms, and backward {both:.2f} ms (device {device:.2f}, host "
        f"{asked:.2f}); kept {kept / 1e6:.0f} MB, peak "
        f"{peak / 1e9:.2f} GB, {launches} launches"
    )
    if show:
        for name, ms, count in list(parts(whole))[:30]:
            print(f"    {ms:7.3f} ms {count:3d} x {name[:80]}")


def errors() -> None:
    print("experts", experts_triton.verify(CUDA))
    print("expert_routing", experts_triton_routing.verify(CUDA))
    for op in CASES:
        if op.startswith("moe_"):
            print(op, verify_op(op, CUDA))


def few(name: str) -> None:
    """4-bit weights read inside the product against dequantized ones, by rows an expert."""
    module = Build(0, fast=True).experts(name)
    assert isinstance(module, Experts)
    print(f"{name}: dequantize all {median(lambda: module.dense_slices(slice(0, E))):.3f} ms")
    for tokens in (1, 8, 32, 128, 256, 512, 1024):
        print(
            f"  {tokens} tokens, {tokens * K / E:.1f} rows an expert: {both_ways(module, tokens)}"
        )


def both_ways(module: Experts, tokens: int) -> str:
    """Times of the forward's product and of the backward's, weights read in both ways."""
    _, out, into = module.shape
    chosen = torch.rand(tokens, E, device=CUDA).topk(K, 1).indices
    product = experts_triton._Products(module, experts_triton_routing.routing_of(chosen, E))
    x = torch.randn(tokens, into, device=CUDA).bfloat16()
    dy = torch.randn(tokens * K, out, device=CUDA).bfloat16()
    told = []
    for threshold in (10**9, 0):
        experts_triton.FEW = threshold
        forward = median(lambda: product.base(x, turned=True, spread=True, lora=None))
        backward = median(lambda: product.base(dy, turned=False, spread=False, lora=None))
        how = "read inside" if threshold else "dequantized"
        told.append(f"{how} {forward:.3f} / {backward:.3f} ms")
    experts_triton.FEW = FEW
    return "; ".join(told)


def routing(tokens: int) -> None:
    chosen = torch.rand(tokens, E, device=CUDA).topk(K, 1).indices
    theirs = median(lambda: Routing.of(chosen, E))
    ours = median(lambda: experts_triton_routing.routing_of(chosen, E))
    print(f"routing of {tokens} tokens: torch {theirs:.3f} ms, triton {ours:.3f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--r", type=int, default=8)
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
    errors()
    routing(args.tokens)
    block(args.tokens, args.r, fast=True, show=True)
    block(args.tokens, 0, fast=True, show=True)
    block(args.tokens, args.r, fast=True, resident=True)
    block(args.tokens, args.r, fast=False)
    few("m.experts.gate_up_proj")
    few("m.experts.down_proj")


if __name__ == "__main__":
    main()
