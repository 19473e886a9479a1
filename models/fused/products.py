"""Products of rows that are sorted by expert with the weights of each one's own; plain:
models.moe.grouped_linear.

Tiles are read by tensor descriptors (Hopper's copy engine), for which rows are whole 16 bytes. What
a tile reads beyond the rows of its expert is not stored. Where torch's own grouped product is as
fast, it is called.
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
    """How a product is cut up, chosen by measuring on an H100."""

    rows: int
    columns: int
    stages: int
    warps: int
    group: int
    """Row tiles of an expert that take the same columns one after the other: the columns are then
    still in the L2."""
    registers: int | None = None
    """Of a thread, at most: what lets two programs share a multiprocessor."""


GATE_UP = Tiles(128, 64, 3, 8, group=8, registers=128)
PRODUCT = Tiles(128, 128, 3, 8, group=8, registers=128)
PRODUCT_OF_FEW = Tiles(64, 128, 4, 4, group=16)
DEPTH = 64
"""Numbers that a tile's products take at a time."""
FEW = 256
"""Rows of an expert, on average, below which tiles are small."""
MANY = 1024
"""... and from which on torch's product is as fast as ours."""


@triton.jit
def spread_out(ends_ptr, experts, BM: tl.constexpr, EXPERTS: tl.constexpr):
    """Of each expert: where its rows begin and end, and how many tiles there are up to its last."""
    expert = tl.arange(0, EXPERTS)
    ends = tl.load(ends_ptr + tl.minimum(expert, experts - 1))
    starts = tl.load(ends_ptr + tl.minimum(expert, experts) - 1, expert > 0, other=0)
    return starts, ends, tl.cumsum((ends - starts + BM - 1) // BM)


@triton.jit
def tile_at(
    tile, across, starts, ends, last,
    BM: tl.constexpr, EXPERTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The tile's expert, its first row, where the expert's rows end, and its block of columns."""
    expert = tl.arange(0, EXPERTS)
    e = tl.sum((last <= tile // across).to(tl.int32))
    mine = expert == e
    start = tl.sum(tl.where(mine, starts, 0))
    end = tl.sum(tl.where(mine, ends, 0))
    high = (end - start + BM - 1) // BM
    inside = tile - (tl.sum(tl.where(mine, last, 0)) - high) * across
    first = inside // (GROUP * across) * GROUP
    size = tl.minimum(GROUP, high - first)
    within = inside % (GROUP * across)
    return e, start + (first + within % size) * BM, end, within // size


@triton.jit
def keep(to_ptr, tile, row, end, column, width, stride, BM: tl.constexpr, BN: tl.constexpr):
    """Stores the rows before `end` and the columns before `width` of a tile."""
    down, right = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    to = to_ptr + tl.cast(row, tl.int64) * stride + column
    mask = (row + down < end) & (column + right < width)
    tl.store(to + down * stride + right, tile.to(to_ptr.dtype.element_ty), mask)


@triton.jit
def rows_kernel(
    x_desc, w_desc, out_ptr, ends_ptr, experts, N, K, height,
    TURNED: tl.constexpr, EXPERTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x (M, K) times w (E, N, K) turned, or (E, K, N); `height` is w's second dimension."""
    starts, ends, last = spread_out(ends_ptr, experts, BM, EXPERTS)
    across = tl.cdiv(N, BN)
    for tile in range(tl.program_id(0), tl.max(last) * across, tl.num_programs(0)):
        e, row, end, block = tile_at(tile, across, starts, ends, last, BM, EXPERTS, GROUP)
        n = block * BN
        out = tl.zeros([BM, BN], tl.float32)
        for k in range(0, K, BK):
            x = x_desc.load([row, k])
            if TURNED:
                out = tl.dot(x, w_desc.load([e * height + n, k]).T, out)
            else:
                out = tl.dot(x, w_desc.load([e * height + k, n]), out)
        keep(out_ptr, out, row, end, n, N, N, BM, BN)


@triton.jit
def gate_up_kernel(
    x_desc, w_desc, gate_up_ptr, h_ptr, weight_ptr, ends_ptr, experts, F, K,
    EXPERTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x (M, K) times w (2E, F, K) turned, gate and up in one product, and silu(gate) * up of it."""
    starts, ends, last = spread_out(ends_ptr, experts, BM, EXPERTS)
    across = tl.cdiv(F, BN)
    for tile in range(tl.program_id(0), tl.max(last) * across, tl.num_programs(0)):
        e, row, end, block = tile_at(tile, across, starts, ends, last, BM, EXPERTS, GROUP)
        n = block * BN
        both = tl.zeros([BM, 2 * BN], tl.float32)
        for k in range(0, K, BK):
            w = tl.reshape(w_desc.load([2 * e, n, k]), (2 * BN, BK))
            both = tl.dot(x_desc.load([row, k]), w.T, both)
        gate, up = tl.split(tl.permute(tl.reshape(both, (BM, 2, BN)), (0, 2, 1)))
        rows = row + tl.arange(0, BM)
        weight = tl.load(weight_ptr + rows, rows < end, other=0.0)
        keep(gate_up_ptr, gate, row, end, n, F, 2 * F, BM, BN)
        keep(gate_up_ptr, up, row, end, F + n, 2 * F, 2 * F, BM, BN)
        h = gate * tl.sigmoid(gate) * up * weight[:, None]
        keep(h_ptr, h, row, end, n, F, F, BM, BN)


def grouped(x_MK: Tensor, weight: Tensor, ends_E: Tensor, turned: bool = False) -> Tensor:
    """x (M, K), its rows up to ends_E[e] times expert e's weight (K, N), or (N, K) `turned`."""
    rows = len(x_MK) / len(ends_E)
    if rows >= MANY:
        return F.grouped_mm(x_MK, weight.mT if turned else weight, offs=ends_E)
    columns, tiles = weight.shape[1 if turned else 2], PRODUCT_OF_FEW if rows < FEW else PRODUCT
    out_MN = x_MK.new_empty(len(x_MK), columns)
    block = (tiles.columns, DEPTH) if turned else (DEPTH, tiles.columns)
    rows_kernel[programs(x_MK, ends_E, columns, tiles)](
        blocks(x_MK, tiles.rows, DEPTH), blocks(weight.flatten(0, 1), *block), out_MN, ends_E,
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
    each = weight.view(2 * len(ends_E), inner, -1)
    gate_up_MF, h_MF = x_MK.new_empty(len(x_MK), 2 * inner), x_MK.new_empty(len(x_MK), inner)
    gate_up_kernel[programs(x_MK, ends_E, inner, tiles)](
        blocks(x_MK, tiles.rows, DEPTH), blocks(each, 2, tiles.columns, DEPTH),
        gate_up_MF, h_MF, weight_M, ends_E, len(ends_E), inner, x_MK.shape[1],
        EXPERTS=triton.next_power_of_2(len(ends_E)), **options(tiles),
    )  # fmt: skip
    return gate_up_MF, h_MF


def grouped_weights(a_MP: Tensor, b_MQ: Tensor, ends_E: Tensor) -> Tensor:
    """a (M, P) turned times b (M, Q) over the rows of each expert -> (E, P, Q)."""
    return F.grouped_mm(a_MP.T, b_MQ, offs=ends_E)


def blocks(x: Tensor, *shape: int) -> TensorDescriptor:
    """x, to be read in blocks of that shape."""
    return TensorDescriptor.from_tensor(x, list(shape))


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
        "BM": tiles.rows, "BN": tiles.columns, "BK": DEPTH, "GROUP": tiles.group,
        "num_stages": tiles.stages, "num_warps": tiles.warps, "maxnreg": tiles.registers,
    }  # fmt: skip
