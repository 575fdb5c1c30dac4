"""The loss head on a GPU, forward and backward: chunk by chunk, beside plain cross entropy.

    python benchmarks/loss_head_gpu.py [--rows 8192] [--widths 2560,4096,2048,1024]

Random hidden states and head in bf16, 248,320 rows of vocabulary, every position supervised, the
mean over rows. ``plain`` keeps bf16 logits of all rows. Medians of a few runs; memory is what is
held at most beside hidden states and head, their gradient included. The two products alone are
the floor of the exact loss.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from train_step_gpu import commit

from qcore.nn import loss, loss_triton

V = 248320


def milliseconds(run: Callable[[], object], times: int = 6) -> float:
    """Median GPU time of `run`."""
    pairs = []
    run()
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def main() -> None:
    """Print a table a width."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--widths", default="2560,4096,2048,1024")
    given = parser.parse_args()
    print(f"{time.strftime('%Y-%m-%d %H:%M')} commit {commit()}, {torch.cuda.get_device_name()}")
    print(f"check on this card: {loss_triton.verify(torch.device('cuda')).text}")
    for width in map(int, given.widths.split(",")):
        table(given.rows, width)


@torch.no_grad()
def products(hidden: torch.Tensor, head: torch.Tensor) -> float:
    """Milliseconds of the two products of all rows."""
    logits = hidden @ head.t()
    one = milliseconds(lambda: torch.mm(hidden, head.t(), out=logits))
    return one + milliseconds(lambda: torch.mm(logits, head))


def table(rows: int, width: int) -> None:
    """Times and peaks at one width."""
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(rows, width, requires_grad=True, **kind)
    head = torch.randn(V, width, **kind) * 2 / width**0.5
    targets = torch.randint(V, (rows,), device="cuda")

    def step(value: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            hidden.grad = None
            value().backward()

        return run

    def triton(chunk: int | None) -> Callable[[], None]:
        return step(lambda: loss_triton.cross_entropy_sum(hidden, head, targets, chunk) / rows)

    print(f"{rows} x {width} x {V}: two products {products(hidden, head):.1f} ms")
    sides = {
        f"default, {loss_triton.chunk_rows(V, 2)} rows": triton(None),
        **{f"{chunk} rows": triton(chunk) for chunk in (512, 2048, 4096)},
        "reference in torch": step(lambda: loss.cross_entropy_sum(hidden, head, targets) / rows),
        "plain, bf16 logits": step(lambda: F.cross_entropy(hidden @ head.t(), targets)),
    }
    for name, run in sides.items():
        hidden.grad = None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ms = milliseconds(run)
        peak = torch.cuda.max_memory_allocated() - before
        print(f"  {name:<20}{ms:>8.1f} ms{peak / 1e9:>8.2f} GB")


if __name__ == "__main__":
    main()
