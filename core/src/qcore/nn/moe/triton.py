"""Triton backend of expert layers, forward and backward: which kernels run, with which tiles.

This file decides which kernels run for a map and its gradients and how their tiles are cut: if an
expert has few rows, its 4-bit weights are read inside the product; otherwise all weights are
dequantized once for it. The host does not learn the order of the rows. Needs Triton at import.

LoRA's sum is added in the product's own float32 sum; gradients of A and B are float32 sums, written
in PEFT's layout. A token's k rows are not materialized where the token can be read instead.

Shapes: T tokens, k experts a token, ``R = T k`` rows, E experts, r LoRA's rank.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...api.records import Verdict
from ..kernels.compare import compare, worst_verdict
from ..kernels.launch import cdiv, launch, next_power_of_2
from ..qlora.lora_layer import Lora
from ..qlora.nf4 import BLOCK
from ..qlora.nf4_triton import table_of
from . import triton_gemm as gemm
from .experts import TOGETHER, Experts, Tokens
from .experts import grouped as reference
from .routing import Routing

#: Rows an expert, on average, below which 4-bit weights are read inside the product.
FEW = 12


#: Shared memory of a program, bytes: Hopper has 227 KiB, and the compiler keeps a few.
_SHARED = 224 << 10


@dataclass(frozen=True, slots=True)
class _Cut:
    """How the tiles of a product are cut."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def _cut(rows: int, experts: int, dtype: torch.dtype, *, nf4: bool, rank: int = 0) -> _Cut:
    """The cut that is fastest of those that leave room for tiles of LoRA's rank."""
    cut = _free_cut(rows, experts, dtype, nf4=nf4)
    while rank and _shared(cut, rank, dtype) > _SHARED and (cut.stages > 2 or cut.columns > 64):
        if cut.stages > 2:
            cut = replace(cut, stages=cut.stages - 1)
        else:
            cut = replace(cut, columns=cut.columns // 2)
    return cut


def _shared(cut: _Cut, rank: int, dtype: torch.dtype) -> int:
    """Bytes of shared memory that a product's tiles take: of the loop, and of LoRA after it."""
    sides = cut.rows + cut.columns
    return dtype.itemsize * sides * (cut.depth * cut.stages + rank)


def _free_cut(rows: int, experts: int, dtype: torch.dtype, *, nf4: bool) -> _Cut:
    height = tile_rows(rows, experts)
    if nf4:
        return _Cut(height, 64, 128, 4, 1)
    if dtype == torch.float32:
        return _Cut(height, 64, 32, 4 if height < 128 else 8, 2)
    if height < 128:
        return _Cut(height, 128, 64, 4, 4)
    return _Cut(128, 256, 64, 8, 4)


def tile_rows(rows: int, experts: int) -> int:
    """Rows of a tile: a little more than an expert has on average, from 16 to 128."""
    return min(128, max(16, next_power_of_2(rows * 5 // (4 * experts))))


def tile_count(rows: int, experts: int) -> int:
    """How many tiles there are at most: each expert's last one may be part empty."""
    return rows // tile_rows(rows, experts) + min(experts, rows)


def tiles_of(routing: Routing) -> Tensor:
    """Expert and first row of each tile, ``[tiles, 2]`` int32; made once for a routing."""
    if routing.tiles is None:
        rows, experts = len(routing.order), len(routing.ends)
        count = tile_count(rows, experts)
        tiles = routing.ends.new_empty(count, 2)
        launch(
            gemm.tile_table, (cdiv(count, 64),), routing.ends, tiles, count, experts,
            BM=tile_rows(rows, experts), BE=next_power_of_2(experts), BT=64,
        )  # fmt: skip
        routing.tiles = tiles
    return routing.tiles


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


@dataclass(frozen=True, slots=True)
class _Products:
    """The products of one map over one routing."""

    module: Experts
    routing: Routing

    def base(
        self, x: Tensor, *, turned: bool, spread: bool, lora: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """``x_i W_e^T`` or, not `turned`, ``x_i W_e``, plus ``left_i right_e`` of `lora`.

        Args:
            x: rows, or with `spread` tokens.
            turned: the forward's product.
            spread: whether rows are read as their tokens.
            lora: ``[R, r]`` in the dtype of x and ``[E, r, n]``.
        """
        experts, out, into = self.module.shape
        rows, (n, k) = len(self.routing.order), (out, into) if turned else (into, out)
        y = x.new_empty(rows, n)
        nf4 = self._few(x)
        rank = 0 if lora is None else _rank(lora[0].shape[1])
        cut = _cut(rows, experts, x.dtype, nf4=nf4, rank=rank)
        step = experts if nf4 else max(1, TOGETHER // (x.element_size() * out * into))
        for first in range(0, experts, step):
            last = min(first + step, experts)
            weights, codes, blocks2 = self._weights(slice(first, last), nf4)
            left, right = lora if lora is not None else (x, x)
            launch(
                gemm.grouped, (cdiv(n, cut.columns), len(tiles_of(self.routing))),
                x, weights, y, self.routing.order, tiles_of(self.routing), self.routing.ends,
                left, right, *codes, first, last, n, k, x.stride(0), blocks2, n,
                RANK=left.shape[1] if lora is not None else 0, TURNED=turned,
                CHOICES=self.routing.k if spread else 0, NF4=nf4, LORA=lora is not None,
                EVEN_N=n % cut.columns == 0, EVEN_K=k % cut.depth == 0,
                PRECISION=_precision(x.dtype), BM=cut.rows, BN=cut.columns, BK=cut.depth,
                BR=rank or 16,
                num_warps=cut.warps, num_stages=cut.stages,
                flops=2 * rows * n * k * (last - first) / experts, share=0.53,
            )  # fmt: skip
            del weights
        return y

    def thin(self, x: Tensor, right: Tensor, r: int, *, spread: bool) -> Tensor:
        """``x_i right_e^T``: ``[R, r]`` in the dtype of x, `right` ``[E r, n]``."""
        rows, tiles = len(self.routing.order), tiles_of(self.routing)
        out, k = x.new_empty(rows, r), x.shape[1]
        launch(
            gemm.thin, (len(tiles),), x, right, out, self.routing.order, tiles, self.routing.ends,
            k, x.stride(0), RANK=r, CHOICES=self.routing.k if spread else 0, EVEN_K=k % 64 == 0,
            PRECISION=_precision(x.dtype), BM=tile_rows(rows, len(self.routing.ends)), BK=64,
            BR=_rank(r), num_warps=8, num_stages=4, flops=2.0 * rows * k * r,
        )  # fmt: skip
        return out

    def outer(
        self, small: Tensor, big: Tensor, scale: float, *, spread: bool, is_a: bool
    ) -> Tensor | None:
        """``scale sum_i small_i big_i^T`` by expert, float32: ``[E r, n]`` or as B, ``[n, r E]``.

        Added to the parameter's gradient where its module wants that: then ``None``.
        """
        # The module's own: what was saved may be a copy without a gradient.
        matrix = self.module.lora_A if is_a else self.module.lora_B
        sink = matrix.grad if matrix is not None and self.module.accumulates else None
        experts, r, n = len(self.routing.ends), small.shape[1], big.shape[1]
        shape = (experts * r, n) if is_a else (n, r * experts)
        strides = (r * n, n, 1) if is_a else (1, experts, r * experts)
        out = torch.empty(shape, device=small.device) if sink is None else sink
        height = min(64, tile_rows(len(small), experts))
        launch(
            gemm.outer, (cdiv(n, 128), experts), small, big, out, self.routing.order,
            self.routing.ends, scale, n, big.stride(0), *strides, RANK=r, EVEN_N=n % 128 == 0,
            CHOICES=self.routing.k if spread else 0, ADD=sink is not None,
            PRECISION=_precision(big.dtype), BM=height, BN=128, BR=_rank(r), num_warps=4,
            num_stages=3, flops=2.0 * len(small) * r * n,
        )  # fmt: skip
        return out if sink is None else None

    def turned_b(self, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        """B ``[out, r E]``, scaled, as ``[E r, out]`` in the run's dtype."""
        experts, out, _ = self.module.shape
        turned = torch.empty(b.shape[1], out, dtype=dtype, device=b.device)
        launch(
            gemm.turn, (cdiv(out, 32), cdiv(b.shape[1], 64)), b, turned, scaling,
            out, experts, b.shape[1] // experts, BO=32, BC=64,
        )  # fmt: skip
        return turned

    def sum(self, rows: Tensor) -> Tensor:
        """``[R, H] -> [T, H]``: the sum of each token's rows."""
        tokens, width = len(rows) // self.routing.k, rows.shape[1]
        y = rows.new_empty(tokens, width)
        block = min(2048, next_power_of_2(width))
        launch(
            gemm.gather_sum, (tokens, cdiv(width, block)), rows, self.routing.inverse, y,
            width, rows.stride(0), K=self.routing.k, BH=block, num_warps=4,
        )  # fmt: skip
        return y

    def _few(self, x: Tensor) -> bool:
        """Whether 4-bit weights are read inside the product."""
        module = self.module
        if module.nf4 is None or module.resident or module.shape[2] % BLOCK:
            return False
        return len(self.routing.order) <= FEW * module.shape[0]

    def _weights(self, experts: slice, nf4: bool) -> tuple[Tensor, tuple[Tensor, ...], int]:
        """Values or codes, what codes are read with, and how many scales of scales a slice has."""
        if nf4:
            stack = self.module.nf4
            assert stack is not None
            assert stack.code2 is not None
            table = table_of(stack.packed.device)
            codes = (stack.absmax, stack.absmax2, stack.code2, stack.offset, table)
            return stack.packed.view(torch.int32), codes, stack.absmax2.shape[1]
        weights = self.module.dense_slices(experts)
        return weights, (weights,) * 5, 0


def _rank(r: int) -> int:
    """LoRA's rank as a product of tiles takes it."""
    return max(16, next_power_of_2(r))


def grouped(x: Tensor, module: Experts, routing: Routing, tokens: Tokens = None) -> Tensor:
    """`experts.grouped`, by these kernels; x is bfloat16 or float32, rows of any stride."""
    a, b = module.matrices
    out: Tensor = _Grouped.apply(x, a, b, module, routing, tokens)  # type: ignore[no-untyped-call]
    return out


class _Grouped(torch.autograd.Function):
    """``x W_e^T + s (x A_e^T) B_e^T`` by expert; saves x as it was given, and ``x A_e^T``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        module: Experts,
        routing: Routing,
        tokens: Tokens,
    ) -> Tensor:
        x = _adjacent(x)
        product, spread = _Products(module, routing), tokens == "in"
        lora = xa = None
        if a is not None and b is not None:
            assert module.lora is not None
            xa = product.thin(x, a, module.lora.r, spread=spread)
            # Scaled before it is rounded to the run's dtype, not after.
            lora = xa, product.turned_b(b, module.lora.scaling, x.dtype)
        y = product.base(x, turned=True, spread=spread, lora=lora)
        routing.save(ctx, x, xa, a, b)
        ctx.module, ctx.tokens = module, tokens
        return product.sum(y) if tokens == "out" else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        routing, (x, xa, a, b) = Routing.saved(ctx)
        module: Experts = ctx.module
        dy, spread = _adjacent(dy), ctx.tokens == "out"
        product = _Products(module, routing)
        dx = da = db = lora = None
        if xa is not None:
            assert module.lora is not None
            r, scaling = module.lora.r, module.lora.scaling
            by_b = product.turned_b(b, scaling, dy.dtype)
            dxa = product.thin(dy, by_b, r, spread=spread)
            da = product.outer(dxa, x, 1.0, spread=ctx.tokens == "in", is_a=True)
            db = product.outer(xa, dy, scaling, spread=spread, is_a=False)
            lora = dxa, a
        if ctx.needs_input_grad[0]:
            dx = product.base(dy, turned=False, spread=spread, lora=lora)
            if ctx.tokens == "in":
                dx = product.sum(dx)
        return dx, da, db, None, None, None


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def verify(device: torch.device) -> Verdict:
    """The map and its gradients against torch: LoRA, 4 bit read in both ways, odd counts."""
    verdicts = []
    for tokens, spread in ((517, "in"), (517, "out"), (9, "in"), (9, None)):
        verdicts.append(_compared(device, tokens, cast(Tokens, spread)))
    return worst_verdict(*verdicts)


def _compared(device: torch.device, tokens: int, spread: Tokens) -> Verdict:
    experts, k, out, into, r = 24, 4, 192, 320, 8
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    half = Experts((experts, out, into), torch.bfloat16, Lora(r=r, lora_alpha=2 * r))
    value = draw(experts, out, into) / into**0.5
    half.hold(slice(0, experts), value, quantize=True, dtype=torch.bfloat16)
    wide = Experts(half.shape, torch.float32, half.lora)
    wide.hold(
        slice(0, experts), half.dense_slices(slice(0, experts)), quantize=False, dtype=torch.float32
    )
    chosen = torch.rand(tokens, experts - 1, generator=generator).topk(k, 1).indices.to(device)
    routing = Routing.of(chosen, experts)

    def run(compute: Any, module: Experts) -> Any:
        def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            module.lora_A, module.lora_B = cast(Any, (a, b))
            y: Tensor = compute(x, module, routing, spread)
            return y

        del module.lora_A, module.lora_B
        return function

    a, b = half.lora_shapes(r)
    x = draw(tokens if spread == "in" else tokens * k, into).to(torch.bfloat16)
    inputs = (x, draw(*a) / into**0.5, draw(*b))
    return compare(run(grouped, half), run(reference, wide), inputs, output=6e-3, gradient=1.2e-2)
