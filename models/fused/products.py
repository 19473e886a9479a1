"""Products of rows that are sorted by expert with the weights of each one's own; plain:
models.moe.grouped_linear.

Tiles are read by tensor descriptors (Hopper's copy engine), for which rows are whole 16 bytes. What
a tile reads beyond the rows of its expert is not stored.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Tiles(NamedTuple):
    """How a product is cut up, chosen by measuring on an H200."""

    rows: int
    columns: int
    stages: int
    warps: int
    registers: int | None = None
    """Of a thread, at most: what lets two programs share a multiprocessor."""


GATE_UP = Tiles(128, 64, 3, 8, registers=128)
PRODUCT = Tiles(128, 128, 3, 8, registers=128)
PRODUCT_OF_FEW = Tiles(64, 128, 4, 4)
WEIGHTS = Tiles(128, 128, 3, 4)
DEPTH = 64
"""Numbers that a tile's products take at a time."""
FEW = 256
"""Rows of an expert, on average, below which tiles are small."""


@triton.jit
def spread_out(ends_ptr, experts, BM: tl.constexpr, EXPERTS: tl.constexpr):
    """Of each expert: where its rows begin and end, and how many tiles there are up to its last."""
    expert = tl.arange(0, EXPERTS)
    ends = tl.load(ends_ptr + tl.minimum(expert, experts - 1))
    starts = tl.load(ends_ptr + tl.minimum(expert, experts) - 1, expert > 0, other=0)
    return starts, ends, tl.cumsum((ends - starts + BM - 1) // BM)


@triton.jit
def rows_of(down, starts, ends, last, BM: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert of the tile that is `down` from the top, its first row, and where its rows end."""
    expert = tl.arange(0, EXPERTS)
    e = tl.sum((last <= down).to(tl.int32))
    mine = expert == e
    start = tl.sum(tl.where(mine, starts, 0))
    end = tl.sum(tl.where(mine, ends, 0))
    tiles = (end - start + BM - 1) // BM
    return e, start + (down - tl.sum(tl.where(mine, last, 0)) + tiles) * BM, end


@triton.jit
def rows_kernel(
    x_desc, w_desc, out_ptr, ends_ptr, experts, N, K, height,
    TURNED: tl.constexpr, EXPERTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x (M, K) times w (E, N, K) turned, or (E, K, N); `height` is w's second dimension."""
    starts, ends, last = spread_out(ends_ptr, experts, BM, EXPERTS)
    across = tl.cdiv(N, BN)
    for tile in range(tl.program_id(0), tl.max(last) * across, tl.num_programs(0)):
        e, row, end = rows_of(tile // across, starts, ends, last, BM, EXPERTS)
        n = tile % across * BN
        out = tl.zeros([BM, BN], tl.float32)
        for k in range(0, K, BK):
            x = x_desc.load([row, k])
            if TURNED:
                out = tl.dot(x, w_desc.load([e * height + n, k]).T, out)
            else:
                out = tl.dot(x, w_desc.load([e * height + k, n]), out)
        down, right = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
        mask = (row + down < end) & (n + right < N)
        to = out_ptr + tl.cast(row, tl.int64) * N + n
        tl.store(to + down * N + right, out.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def gate_up_kernel(
    x_desc, w_desc, gate_up_ptr, h_ptr, weight_ptr, ends_ptr, experts, F, K,
    EXPERTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x (M, K) times w (E, 2F, K) turned, and silu(gate) * up of it."""
    starts, ends, last = spread_out(ends_ptr, experts, BM, EXPERTS)
    across = tl.cdiv(F, BN)
    for tile in range(tl.program_id(0), tl.max(last) * across, tl.num_programs(0)):
        e, row, end = rows_of(tile // across, starts, ends, last, BM, EXPERTS)
        n = tile % across * BN
        gate = tl.zeros([BM, BN], tl.float32)
        up = tl.zeros([BM, BN], tl.float32)
        for k in range(0, K, BK):
            x = x_desc.load([row, k])
            gate = tl.dot(x, w_desc.load([e * 2 * F + n, k]).T, gate)
            up = tl.dot(x, w_desc.load([e * 2 * F + F + n, k]).T, up)
        down, right = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
        mask = (row + down < end) & (n + right < F)
        to = gate_up_ptr + tl.cast(row, tl.int64) * 2 * F + n
        place = down * 2 * F + right
        kind = h_ptr.dtype.element_ty
        tl.store(to + place, gate.to(kind), mask)
        tl.store(to + F + place, up.to(kind), mask)
        h = gate * tl.sigmoid(gate) * up
        h *= tl.load(weight_ptr + row + down, row + down < end, other=0.0)
        to = h_ptr + tl.cast(row, tl.int64) * F + n
        tl.store(to + down * F + right, h.to(kind), mask)


@triton.jit
def weights_kernel(
    a_desc, b_desc, out_ptr, ends_ptr, experts, P, Q,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Of each expert's rows, a (., P) turned times b (., Q) -> (E, P, Q)."""
    across = tl.cdiv(Q, BN)
    each = tl.cdiv(P, BM) * across
    for tile in range(tl.program_id(0), experts * each, tl.num_programs(0)):
        e = tile // each
        p = tile % each // across * BM
        q = tile % each % across * BN
        start = tl.load(ends_ptr + e - 1, e > 0, other=0)
        end = tl.load(ends_ptr + e)
        whole = start + (end - start) // BK * BK
        out = tl.zeros([BM, BN], tl.float32)
        for row in range(start, whole, BK):
            out = tl.dot(a_desc.load([row, p]).T, b_desc.load([row, q]), out)
        if whole < end:  # the next expert's rows count for nothing
            here = (whole + tl.arange(0, BK) < end)[:, None]
            a = tl.where(here, a_desc.load([whole, p]), 0.0)
            b = tl.where(here, b_desc.load([whole, q]), 0.0)
            out = tl.dot(a.T, b, out)
        down, right = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
        mask = (p + down < P) & (q + right < Q)
        to = out_ptr + tl.cast(e * P + p, tl.int64) * Q + q
        tl.store(to + down * Q + right, out.to(out_ptr.dtype.element_ty), mask)


def grouped(x_MK: Tensor, weight: Tensor, ends_E: Tensor, turned: bool = False) -> Tensor:
    """x (M, K), its rows up to ends_E[e] times expert e's weight (K, N), or (N, K) `turned`."""
    columns = weight.shape[1 if turned else 2]
    tiles = PRODUCT_OF_FEW if are_few(x_MK, ends_E) else PRODUCT
    out_MN = x_MK.new_empty(len(x_MK), columns)
    block = (tiles.columns, DEPTH) if turned else (DEPTH, tiles.columns)
    rows_kernel[programs(x_MK, ends_E, columns, tiles)](
        blocks(x_MK, tiles.rows, DEPTH), blocks(weight, *block), out_MN, ends_E,
        len(ends_E), columns, x_MK.shape[1], weight.shape[1], TURNED=turned,
        EXPERTS=triton.next_power_of_2(len(ends_E)), **options(tiles),
    )  # fmt: skip
    return out_MN


def gate_up(
    x_MK: Tensor, weight: Tensor, weight_M: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    """x (M, K), both projections of each expert (E, 2F, K), weights of the rows (M,) in float32 ->
    their products (M, 2F), and silu(gate) * up (M, F) with each row times its weight."""
    inner, tiles = weight.shape[1] // 2, GATE_UP
    gate_up_MF, h_MF = x_MK.new_empty(len(x_MK), 2 * inner), x_MK.new_empty(len(x_MK), inner)
    gate_up_kernel[programs(x_MK, ends_E, inner, tiles)](
        blocks(x_MK, tiles.rows, DEPTH), blocks(weight, tiles.columns, DEPTH), gate_up_MF, h_MF,
        weight_M, ends_E, len(ends_E), inner, x_MK.shape[1],
        EXPERTS=triton.next_power_of_2(len(ends_E)), **options(tiles),
    )  # fmt: skip
    return gate_up_MF, h_MF


def grouped_weights(a_MP: Tensor, b_MQ: Tensor, ends_E: Tensor) -> Tensor:
    """a (M, P) turned times b (M, Q) over the rows of each expert -> (E, P, Q)."""
    if are_few(a_MP, ends_E):  # torch's own is a fifth faster then
        return F.grouped_mm(a_MP.T, b_MQ, offs=ends_E)
    experts, height, width, tiles = len(ends_E), a_MP.shape[1], b_MQ.shape[1], WEIGHTS
    out = a_MP.new_empty(experts, height, width)
    count = experts * triton.cdiv(height, tiles.rows) * triton.cdiv(width, tiles.columns)
    weights_kernel[(min(count, room(out.device)),)](
        blocks(a_MP, DEPTH, tiles.rows), blocks(b_MQ, DEPTH, tiles.columns), out, ends_E,
        experts, height, width, **options(tiles),
    )  # fmt: skip
    return out


def are_few(x_MK: Tensor, ends_E: Tensor) -> bool:
    return len(x_MK) < FEW * len(ends_E)


def blocks(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x (..., C) as a matrix to be read in blocks."""
    return TensorDescriptor.from_tensor(x.flatten(0, -2), [rows, columns])


def programs(x_MK: Tensor, ends_E: Tensor, columns: int, tiles: Tiles) -> tuple[int]:
    """One for each tile of a result with the rows of x, as long as they find room at once; each
    then goes from tile to tile."""
    most = (len(x_MK) // tiles.rows + len(ends_E)) * triton.cdiv(columns, tiles.columns)
    return (min(most, room(x_MK.device)),)


@cache
def room(device: torch.device) -> int:
    """Programs that run at once: two on each multiprocessor."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def options(tiles: Tiles) -> dict[str, int | None]:
    return {
        "BM": tiles.rows, "BN": tiles.columns, "BK": DEPTH,
        "num_stages": tiles.stages, "num_warps": tiles.warps, "maxnreg": tiles.registers,
    }  # fmt: skip
