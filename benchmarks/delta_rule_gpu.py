"""The Triton delta rule on a GPU: errors against float32, milliseconds of each kernel.

``python benchmarks/delta_rule_gpu.py [--sweep] [--quick]``. Errors are relative, of bf16 inputs
against the torch form in float32 on the same numbers; free memory holds NaN. Times are medians of
`triton.testing.do_bench`, which empties the cache between runs. ``--sweep`` also times other warps
and stages, compiled beforehand in processes of their own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from qcore_qwen35.ops import optional
from qcore_qwen35.ops.delta_rule import chunked_delta_rule as reference
from qcore_qwen35.ops.delta_rule import triton_gradients, triton_prepare, triton_rule, triton_scan
from qcore_qwen35.ops.delta_rule.layout import Chunks

#: log decay: (lowest, highest)
DECAYS = {"usual": (-0.5, 0.0), "near 1": (-1e-4, 0.0), "near 0": (-30.0, -10.0), "mixed": (-20, 0)}
NAMES = ("o", "state", "dq", "dk", "dv", "dg", "dbeta", "dinitial")
SWEEP: dict[str, list[tuple[int, ...]]] = {
    "prepare": [(4, 1, 255), (4, 1, 168), (4, 1, 128)],
    "outputs": [(32, 4, 2), (64, 4, 2), (32, 4, 3), (16, 4, 2)],
    "states": [(32, 4, 2), (64, 4, 2), (32, 4, 1), (16, 4, 2)],
    "pairs": [(64, 4, 1), (32, 4, 1), (64, 4, 2)],
    "gradients": [(64, 4, 1), (32, 4, 1), (64, 4, 2)],
}


def configure(kernel: str, config: tuple[int, ...]) -> None:
    if kernel in ("outputs", "states"):
        triton_scan.CONFIG[kernel] = config
    elif kernel in ("pairs", "gradients"):
        triton_gradients.CONFIG[kernel] = config
    else:
        triton_prepare.CONFIG = config


def inputs(
    lengths: tuple[int, ...],
    heads: tuple[int, int],
    dims: tuple[int, int],
    decay: tuple[float, float] = DECAYS["usual"],
    dtype: torch.dtype = torch.bfloat16,
    given: bool = False,
) -> tuple[list[Tensor], tuple[int, ...]]:
    """q, k, v as columns of one buffer; g; beta; perhaps states."""
    (hk, hv), (dk, dv), tokens = heads, dims, sum(lengths)
    mixed = torch.randn(tokens, 2 * hk * dk + hv * dv, device="cuda").to(dtype)
    parts = mixed.split((hk * dk, hk * dk, hv * dv), -1)
    q, k, v = (x.unflatten(-1, (-1, d)) for x, d in zip(parts, (dk, dk, dv)))
    low, high = decay
    g = torch.rand(tokens, hv, device="cuda") * (high - low) + low
    beta = torch.randn(tokens, hv, device="cuda").mul(2).sigmoid().to(dtype)
    made = [q, k, v, g, beta]
    if given:
        made.append(torch.randn(len(lengths), hv, dk, dv, device="cuda"))
    return made, tuple(sum(lengths[:n]) for n in range(len(lengths) + 1))


def poison() -> None:
    held = [torch.full((1 << 26,), float("nan"), device="cuda") for _ in range(8)]
    del held


def errors(made: list[Tensor], cu: tuple[int, ...]) -> dict[str, float]:
    results = []
    for rule, wide in ((triton_rule.chunked_delta_rule, False), (reference, True)):
        leaves = [(x.float() if wide else x).detach().requires_grad_() for x in made]
        poison()
        o, state = rule(*leaves[:5], cu, *leaves[5:])
        torch.manual_seed(1)
        do, ds = torch.randn(o.shape, device="cuda"), torch.randn(state.shape, device="cuda")
        do = do.to(made[0].dtype).to(o.dtype)
        poison()
        results.append([o, state, *torch.autograd.grad([o, state], leaves, [do, ds])])
    found = {}
    for name, a, b in zip(NAMES, *results):
        found[name] = float((a.detach().float() - b.detach()).norm() / b.detach().norm())
    return found


def check() -> None:
    cases: list[tuple[str, Any]] = [
        (f"{name} {lengths} {heads} {dims}", (lengths, heads, dims, DECAYS[name]))
        for name, lengths, heads, dims in (
            ("usual", (1000, 1, 77, 64), (2, 4), (128, 128)),
            ("near 1", (4097,), (2, 4), (128, 128)),
            ("near 0", (515, 130), (2, 4), (128, 128)),
            ("mixed", (300, 333), (2, 6), (128, 128)),
            ("usual", (1000, 1, 77), (2, 2), (64, 64)),
            ("mixed", (129,), (1, 2), (64, 128)),
        )
    ]
    for name, case in cases:
        torch.manual_seed(0)
        made, cu = inputs(*case, given=True)
        found = errors(made, cu)
        print(f"{name:48}", " ".join(f"{n} {e:.1e}" for n, e in found.items()), flush=True)


def stages(made: list[Tensor], cu: tuple[int, ...]) -> dict[str, Any]:
    """Each kernel as a call of its own."""
    q, k, v, g, beta = made[:5]
    tables = Chunks.of(cu, 64, q.device).tables
    assert tables is not None
    do = torch.randn_like(v)
    once = triton_prepare.prepare(q, k, g, beta, tables, forward=True)
    ready = triton_prepare.prepare(q, k, g, beta, tables, forward=False)
    scanned = triton_scan.states(q, k, v, ready, None, tables, do, None)[:4]
    return {
        "prepare": lambda: triton_prepare.prepare(q, k, g, beta, tables, forward=True),
        "outputs": lambda: triton_scan.outputs(q, k, v, once, None, tables),
        "states": lambda: triton_scan.states(q, k, v, ready, None, tables, do, None),
        "gradients": lambda: triton_gradients.gradients(
            q, k, g, beta, ready.factors, do, scanned, tables
        ),
    }


def profiled(call: Any, runs: int = 5) -> str:
    """Milliseconds of every kernel of a call."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(runs):
            call()
        torch.cuda.synchronize()
    events = sorted(seen.key_averages(), key=lambda one: -one.self_device_time_total)
    return ", ".join(
        f"{one.key[:24]} {one.self_device_time_total / runs / 1e3:.3f}" for one in events[:8]
    )


def timed(call: Any) -> float:
    return float(do_bench(call, warmup=15, rep=60, return_mode="median"))


def times(lengths: tuple[int, ...], heads: tuple[int, int], dims: tuple[int, int]) -> None:
    made, cu = inputs(lengths, heads, dims)
    layout = Chunks.of(cu, 64, made[0].device)
    leaves = [x.detach().requires_grad_() for x in made]
    rule = triton_rule.chunked_delta_rule
    o, _ = rule(*leaves, cu, layout=layout)
    do = torch.randn_like(o)
    forward = timed(lambda: rule(*made, cu, layout=layout))
    backward = timed(lambda: torch.autograd.grad(o, leaves, do, retain_graph=True))
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(20):
        rule(*made, cu, layout=layout)
    host = (time.perf_counter() - started) / 20 * 1e3
    torch.cuda.synchronize()

    def both() -> None:
        torch.autograd.grad(rule(*leaves, cu, layout=layout)[0], leaves, do)

    shape = f"{len(lengths)} x {lengths[0]} heads {heads} of {dims[1]}"
    print(
        f"{shape:36} forward {forward:.3f} backward {backward:.3f} ms; host forward {host:.3f}; "
        f"{profiled(both)}",
        flush=True,
    )


def peers(lengths: tuple[int, ...], heads: tuple[int, int], dims: tuple[int, int]) -> None:
    """Other projects' kernels, where installed, through the same arguments; ours beside them."""
    made, cu = inputs(lengths, heads, dims)
    layout = Chunks.of(cu, 64, made[0].device)
    leaves = [x.detach().requires_grad_() for x in made]
    rules: dict[str, Any] = {"qcore": triton_rule.chunked_delta_rule}
    for record in optional.kernels():
        if record.op == "qwen35::delta_rule":
            try:
                rules[record.backend] = record.load()
            except ImportError as error:
                print(f"{record.backend}: not installed ({error})", flush=True)
    for _ in range(2):
        for name, rule in rules.items():
            try:
                o, _ = rule(*leaves, cu, layout=layout)
                do = torch.randn_like(o)
                forward = timed(lambda rule=rule: rule(*made, cu, layout=layout))
                both = timed(
                    lambda rule=rule, do=do: torch.autograd.grad(
                        rule(*leaves, cu, layout=layout)[0], leaves, do
                    )
                )
            except Exception as error:  # noqa: BLE001  whatever another project raises
                print(f"{name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
                continue
            print(
                f"{len(lengths)} x {lengths[0]} heads {heads}: {name:10} forward {forward:.3f}, "
                f"forward + backward {both:.3f} ms",
                flush=True,
            )


def first_of(kernel: Any) -> str:
    """Registers and spills of what was compiled of a kernel."""
    said = []
    for cache in kernel.device_caches.values():
        for one in cache[0].values():
            said.append(f"regs {one.n_regs} spills {one.n_spills} smem {one.metadata.shared}")
    return "; ".join(said)


def compile_one(number: int) -> None:
    """All kernels with the given entry of the sweep, so that the disk cache has them."""
    for name, configs in SWEEP.items():
        configure(name, configs[min(number, len(configs) - 1)])
    made, cu = inputs((128,), (1, 2), (128, 128), given=True)
    for call in stages(made, cu).values():
        try:
            call()
        except (OutOfResources, RuntimeError) as error:
            print(number, type(error).__name__, str(error)[:100])
    torch.cuda.synchronize()


def sweep() -> None:
    chosen = {
        "prepare": triton_prepare.CONFIG,
        **triton_scan.CONFIG,
        **triton_gradients.CONFIG,
    }
    made, cu = inputs((8192,), (16, 32), (128, 128))
    calls = stages(made, cu)
    for name, configs in SWEEP.items():
        for config in configs:
            configure(name, config)
            torch.manual_seed(0)
            try:
                ms = timed(calls["gradients" if name == "pairs" else name])
                small, small_cu = inputs((300, 333), (2, 4), (128, 128), DECAYS["mixed"])
                worst = max(errors(small, small_cu).values())
            except (OutOfResources, RuntimeError) as error:
                print(f"{name} {config}: {type(error).__name__} {str(error)[:80]}", flush=True)
                continue
            print(f"{name:10} {config}: {ms:.3f} ms, error {worst:.1e}", flush=True)
        configure(name, chosen[name])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--quick", action="store_true", help="no table of errors")
    parser.add_argument("--peers", action="store_true", help="only other projects' beside ours")
    parser.add_argument("--compile", type=int)
    options = parser.parse_args()
    if options.compile is not None:
        return compile_one(options.compile)
    started = time.perf_counter()
    if options.peers:
        for lengths in ((8192,), (2048,), (32768,)):
            peers(lengths, (16, 32), (128, 128))
        return None
    if options.sweep:
        most = max(len(configs) for configs in SWEEP.values())
        command = [sys.executable, __file__, "--compile"]
        for child in [subprocess.Popen([*command, str(n)]) for n in range(most)]:
            child.wait()
        print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)
    print(torch.cuda.get_device_name(), torch.__version__, sys.modules["triton"].__version__)
    times((8192,), (16, 32), (128, 128))
    for name, kernel in (
        ("prepare", triton_prepare._prepare),
        ("outputs", triton_scan._outputs),
        ("states", triton_scan._states),
        ("pairs", triton_gradients._pairs),
        ("gradients", triton_gradients._gradients),
    ):
        print(name, first_of(kernel), flush=True)
    if options.sweep:
        sweep()
    if not options.quick:
        check()
    for lengths, heads in (
        ((4096,) * 2, (16, 32)), ((256,) * 32, (16, 32)), ((2048,), (16, 32)),
        ((32768,), (16, 32)), ((8192,), (16, 48)), ((8192,), (16, 16)),
    ):  # fmt: skip
        times(lengths, heads, (128, 128))
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
