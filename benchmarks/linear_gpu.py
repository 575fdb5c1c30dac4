"""Times 4-bit linear layers with LoRA, single and stacked, on a GPU beside the 16-bit product.

Prints the GPU, the versions, and for each shape milliseconds forward and backward of qcore's
4-bit layer with LoRA, of the bare 16-bit product, and of reading 4 bit. Run from the checkout:
``python3 benchmarks/linear_gpu.py``.
"""

from __future__ import annotations

import torch
from triton.testing import do_bench

from qcore.nn.optim import FlatAdamW
from qcore.nn.qlora.linear import Linear
from qcore.nn.qlora.lora_layer import Lora
from qcore.nn.qlora.nf4_triton import dequantize
from qcore.nn.qlora.stacked_linear import Stacked

T = 8192
BF16 = torch.bfloat16
DEVICE = torch.device("cuda")
#: (in, outs, LoRA or not of each): MLP and mixers of a 4B.
STACKS = {
    "gate + up": (2560, (9216, 9216), (True, True)),
    "qkv + z + a + b": (2560, (8192, 4096, 32, 32), (True, True, False, False)),
    "q + k + v": (2560, (8192, 1024, 1024), (True, True, True)),
    "down": (9216, (2560,), (True,)),
    "out": (4096, (2560,), (True,)),
}


def build(into: int, outs: tuple[int, ...], adapted: tuple[bool, ...], r: int) -> list[Linear]:
    maps = []
    for out, lora in zip(outs, adapted, strict=True):
        adapter = Lora(r=r, lora_alpha=r) if lora else None
        module = Linear((out, into), BF16, adapter, dequantize=dequantize)
        weight = torch.randn(out, into, device=DEVICE) / into**0.5
        module.hold(slice(0, out), weight, quantize=lora, dtype=BF16)
        module.reset_lora(str(out), 0, DEVICE)
        if module.lora_B is not None:
            module.lora_B.data.normal_(0, 0.01)
        maps.append(module)
    return maps


def ms(function) -> float:
    return do_bench(function, warmup=20, rep=60, return_mode="median")


def measure(name: str, r: int, *, resident: bool = False, stacked: bool = True) -> None:
    into, outs, adapted = STACKS[name]
    maps = build(into, outs, adapted, r)
    for one in maps:
        one.resident = resident
    FlatAdamW([one for one in maps if one.lora], lr=1e-3, weight_decay=0.0)
    x = torch.randn(T, into, device=DEVICE, dtype=BF16, requires_grad=True)
    dy = torch.randn(T, sum(outs), device=DEVICE, dtype=BF16)
    slices = list(torch.split(dy, list(outs), 1))
    stack = Stacked(tuple(maps)) if stacked else lambda x: tuple(one(x) for one in maps)
    outputs = stack(x)
    forward = ms(lambda: stack(x))
    backward = ms(lambda: torch.autograd.grad(outputs, x, slices, retain_graph=True))
    weight = torch.randn(sum(outs), into, device=DEVICE, dtype=BF16)
    bare, back = ms(lambda: x @ weight.t()), ms(lambda: dy @ weight)
    read = ms(lambda: [one.nf4.into(weight[: one.shape[0]]) for one in maps if one.nf4])
    flops = 2 * T * into * sum(outs) / 1e9
    how = "stacked" if stacked else "apart"
    print(
        f"{name:16} r {r:3} {how:8} {'resident' if resident else '4 bit':8} "
        f"forward {forward:.3f} ({flops / forward:.0f} TFLOP/s; bare {bare:.3f}, "
        f"{flops / bare:.0f}) backward {backward:.3f} ({flops / backward:.0f}; "
        f"bare {back:.3f}) read {read:.3f}"
    )


def main() -> None:
    import triton

    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
    for name in STACKS:
        measure(name, 16)
    for name in ("gate + up", "qkv + z + a + b"):
        measure(name, 16, stacked=False)
        measure(name, 64)
        measure(name, 16, resident=True)


if __name__ == "__main__":
    main()
