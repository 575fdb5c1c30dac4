"""Triton matmul kernels over rows sorted by expert: base weights (16-bit or NF4) and LoRA.

This file decides how a tile of rows finds its expert without the host knowing the counts, how
rows are read through an index (nothing is gathered beforehand), how 4-bit weights are read
if there are few rows, and that everything is summed in float32. `moe.triton` decides which product
is called when.

A tile table ``[tiles, 2]`` int32 holds the expert and the first row of each tile of BM rows;
tiles past the last have expert -1. Their number is bounded by ``R // BM + E``.

Shapes: R rows sorted by expert, E experts, r LoRA's rank.
"""

# Triton kernels have no types that mypy knows.
# mypy: ignore-errors

from __future__ import annotations

from ..kernels.language import tl, triton


@triton.jit
def _rows(index, rows, K: tl.constexpr):
    """Where sorted rows are read: themselves, or the token of each (K choices a token)."""
    if K == 0:
        return rows.to(tl.int64)
    return tl.load(index + rows) // K


@triton.jit
def _nf4(
    words, absmax, absmax2, code2, offset, table, e, row, column0, inside, IN, OUT, BLOCKS2,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Values ``[ROWS, COLUMNS]`` of slice `e`; a row of it is whole blocks of 64."""
    first = (row * IN + column0)[:, None]
    column = tl.arange(0, COLUMNS // 8) * 8
    mask = inside[:, None] & ((column0 + column) < IN)[None, :]
    word = tl.load(
        words + (e * (OUT * (IN // 8)) + (first + column[None, :]) // 8), mask=mask, other=0
    )
    block = tl.arange(0, COLUMNS // 64) * 64
    mask = inside[:, None] & ((column0 + block) < IN)[None, :]
    block = (first + block[None, :]) // 64
    code = tl.load(absmax + e * (OUT * (IN // 64)) + block, mask=mask, other=0).to(tl.int32)
    scale = tl.load(code2 + code)
    scale *= tl.load(absmax2 + e * BLOCKS2 + block // 256, mask=mask, other=0.0)
    scale += tl.load(offset + e)
    # A byte's first value is in its high half: 1 0 3 2 5 4 7 6.
    shift = (tl.arange(0, 8) ^ 1) * 4
    value = tl.load(table + ((word[:, :, None] >> shift[None, None, :]) & 15))
    value = tl.reshape(value, (ROWS, COLUMNS // 64, 64)) * scale[:, :, None]
    return tl.reshape(value, (ROWS, COLUMNS)).to(DTYPE)


@triton.jit
def tile_table(ends, tiles, count, E, BM: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr):
    """Expert and first row of each tile; every program scans the counts itself."""
    experts = tl.arange(0, BE)
    end = tl.load(ends + experts, mask=experts < E, other=0)
    start = tl.load(ends + experts - 1, mask=(experts > 0) & (experts < E), other=0)
    many = tl.where(experts < E, (end - start + BM - 1) // BM, 0)
    last = tl.cumsum(many, 0)
    tile = tl.program_id(0) * BT + tl.arange(0, BT)
    expert = tl.sum((last[None, :] <= tile[:, None]).to(tl.int32), 1)
    mine = experts[None, :] == expert[:, None]
    first = tl.sum(tl.where(mine, (start - (last - many) * BM)[None, :], 0), 1) + tile * BM
    real = tile < tl.sum(many, 0)
    tl.store(tiles + 2 * tile, tl.where(real, expert, -1), mask=tile < count)
    tl.store(tiles + 2 * tile + 1, tl.where(real, first, 0), mask=tile < count)


@triton.jit
def _tile(
    e, first, end,
    x, weight, y, index, left, right, absmax, absmax2, code2, offset, table,
    first_expert, N, K, stride_x, BLOCKS2, stride_right,
    RANK: tl.constexpr, TURNED: tl.constexpr, CHOICES: tl.constexpr, NF4: tl.constexpr,
    LORA: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The product of one tile: up to BM rows of expert `e` from `first` on, BN columns."""
    rows = first + tl.arange(0, BM)
    live = rows < end
    # Rows past the last are read as the first and never written: no mask in the loop.
    rows = tl.where(live, rows, first)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    n = columns if EVEN_N else tl.where(columns < N, columns, 0)
    k = tl.arange(0, BK)
    at_x = x + _rows(index, rows, CHOICES)[:, None] * stride_x + k[None, :]
    slice_ = (e - first_expert).to(tl.int64)
    if not NF4:
        at_w = weight + slice_ * N * K
        if TURNED:
            at_w += n[None, :].to(tl.int64) * K + k[:, None]
        else:
            at_w += k[:, None].to(tl.int64) * N + n[None, :]
    if LORA:
        # Asked for here, used after the loop: on their way meanwhile.
        r = tl.arange(0, BR)
        la = tl.load(left + rows[:, None] * RANK + r[None, :], mask=(r < RANK)[None, :], other=0.0)
        at = right + e.to(tl.int64) * RANK * stride_right + r[:, None] * stride_right + n[None, :]
        lb = tl.load(at, mask=(r < RANK)[:, None], other=0.0)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k0 in range(0, K, BK):
        inside = k0 + k < K
        a = tl.load(at_x) if EVEN_K else tl.load(at_x, mask=inside[None, :], other=0.0)
        if NF4:
            if TURNED:
                w = _nf4(
                    weight, absmax, absmax2, code2, offset, table, slice_, n, k0, columns < N,
                    K, N, BLOCKS2, BN, BK, a.dtype,
                ).T  # fmt: skip
            else:
                w = _nf4(
                    weight, absmax, absmax2, code2, offset, table, slice_, k0 + k,
                    tl.program_id(0) * BN, inside, N, K, BLOCKS2, BK, BN, a.dtype,
                )  # fmt: skip
        else:
            w = tl.load(at_w) if EVEN_K else tl.load(at_w, mask=inside[:, None], other=0.0)
            at_w += BK if TURNED else BK * N
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
        at_x += BK
    if LORA:
        acc = tl.dot(la, lb.to(la.dtype), acc, input_precision=PRECISION)
    to = y + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(to, acc.to(y.dtype.element_ty), mask=live[:, None] & (columns < N)[None, :])


@triton.jit
def grouped(
    x, weight, y, index, tiles, ends, left, right, absmax, absmax2, code2, offset, table,
    first_expert, last_expert, N, K, stride_x, BLOCKS2, stride_right,
    RANK: tl.constexpr, TURNED: tl.constexpr, CHOICES: tl.constexpr, NF4: tl.constexpr,
    LORA: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``y_i = x_i W_e^T + left_i right_e``; TURNED: W is ``[N, K]`` in memory, else ``[K, N]``.

    `right` is ``[E, r, N]``. Experts outside ``first_expert .. last_expert`` are left alone, and
    `weight` begins at the first. An expert's last rows take half a tile where they fit in it:
    with 256 rows an expert, every second one has a tile that is nearly empty.
    """
    e = tl.load(tiles + 2 * tl.program_id(1))
    if (e < first_expert) | (e >= last_expert):
        return
    first = tl.load(tiles + 2 * tl.program_id(1) + 1)
    end = tl.load(ends + e)
    if BM == 128 and end - first <= 64:
        _tile(
            e, first, end, x, weight, y, index, left, right, absmax, absmax2, code2, offset,
            table, first_expert, N, K, stride_x, BLOCKS2, stride_right, RANK, TURNED, CHOICES,
            NF4, LORA, EVEN_N, EVEN_K, PRECISION, 64, BN, BK, BR,
        )  # fmt: skip
    else:
        _tile(
            e, first, end, x, weight, y, index, left, right, absmax, absmax2, code2, offset,
            table, first_expert, N, K, stride_x, BLOCKS2, stride_right, RANK, TURNED, CHOICES,
            NF4, LORA, EVEN_N, EVEN_K, PRECISION, BM, BN, BK, BR,
        )  # fmt: skip


@triton.jit
def thin(
    x, right, out, index, tiles, ends, K, stride_x,
    RANK: tl.constexpr, CHOICES: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``out_i = x_i right_e^T``: ``[R, r]`` from `right` ``[E r, K]``."""
    e = tl.load(tiles + 2 * tl.program_id(0))
    if e < 0:
        return
    first = tl.load(tiles + 2 * tl.program_id(0) + 1)
    rows = first + tl.arange(0, BM)
    live = rows < tl.load(ends + e)
    rows = tl.where(live, rows, first)
    k = tl.arange(0, BK)
    r = tl.arange(0, BR)
    at_x = x + _rows(index, rows, CHOICES)[:, None] * stride_x + k[None, :]
    at_r = right + (e.to(tl.int64) * RANK + r)[:, None] * K + k[None, :]
    acc = tl.zeros((BM, BR), dtype=tl.float32)
    for k0 in range(0, K, BK):
        inside = (k0 + k < K)[None, :]
        if EVEN_K:
            a = tl.load(at_x)
            b = tl.load(at_r, mask=(r < RANK)[:, None], other=0.0)
        else:
            a = tl.load(at_x, mask=inside, other=0.0)
            b = tl.load(at_r, mask=(r < RANK)[:, None] & inside, other=0.0)
        acc = tl.dot(a, b.to(a.dtype).T, acc, input_precision=PRECISION)
        at_x += BK
        at_r += BK
    to = out + rows.to(tl.int64)[:, None] * RANK + r[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=live[:, None] & (r < RANK)[None, :])


@triton.jit
def outer(
    small, big, out, index, ends, scale, N, stride_big, stride_e, stride_r, stride_n,
    RANK: tl.constexpr, CHOICES: tl.constexpr, EVEN_N: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``scale * sum_i small_i big_i^T`` over each expert's rows, float32, in any layout."""
    e = tl.program_id(1)
    start = tl.load(ends + e - 1, mask=e > 0, other=0)
    end = tl.load(ends + e)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    n = columns if EVEN_N else tl.where(columns < N, columns, 0)
    r = tl.arange(0, BR)
    acc = tl.zeros((BN, BR), dtype=tl.float32)
    for first in range(start, end, BM):
        rows = first + tl.arange(0, BM)
        live = rows < end
        rows = tl.where(live, rows, first)
        at = small + rows.to(tl.int64)[:, None] * RANK + r[None, :]
        # What is masked here is zero: the rows past the end add nothing.
        a = tl.load(at, mask=live[:, None] & (r < RANK)[None, :], other=0.0)
        b = tl.load(big + _rows(index, rows, CHOICES)[:, None] * stride_big + n[None, :])
        # The long side first: the tensor cores' tiles are tall.
        acc = tl.dot(b.T, a, acc, input_precision=PRECISION)
    to = out + e.to(tl.int64) * stride_e + r[None, :].to(tl.int64) * stride_r
    to += columns[:, None].to(tl.int64) * stride_n
    mask = (r < RANK)[None, :] & (columns < N)[:, None]
    acc *= scale
    if ADD:
        acc += tl.load(to, mask=mask, other=0.0)
    tl.store(to, acc, mask=mask)


@triton.jit
def turn(b, out, scale, OUT, E, RANK, BO: tl.constexpr, BC: tl.constexpr):
    """PEFT's B ``[out, r E]`` as ``[E, r, out]``, scaled, then rounded."""
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = (o < OUT)[:, None] & (c < RANK * E)[None, :]
    value = tl.load(b + o[:, None].to(tl.int64) * (RANK * E) + c[None, :], mask=mask, other=0.0)
    row = (c % E) * RANK + c // E
    to = out + row[:, None].to(tl.int64) * OUT + o[None, :]
    tl.store(to, (value * scale).T.to(out.dtype.element_ty), mask=mask.T)


@triton.jit
def gather_sum(rows, inverse, y, H, stride, K: tl.constexpr, BH: tl.constexpr):
    """``y_t = sum_j rows[inverse[t K + j]]``, in float32, rounded once."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    acc = tl.zeros((BH,), dtype=tl.float32)
    for j in tl.static_range(K):
        row = tl.load(inverse + t * K + j)
        acc += tl.load(rows + row * stride + h, mask=h < H, other=0.0).to(tl.float32)
    tl.store(y + t * H + h, acc.to(y.dtype.element_ty), mask=h < H)
