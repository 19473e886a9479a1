"""Products of rows, sorted by expert, with their experts' weights. The plain definition is
models.moe.grouped_linear.

Tiles are read by tensor descriptors (Hopper's copy engine), for which rows must be whole 16 bytes.
What a tile reads beyond the rows of its expert is not stored. Where torch's own grouped product is
as fast, it is called.
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
    """How a product is cut into tiles, chosen by measuring on an H100."""

    rows: int
    columns: int
    stages: int
    warps: int
    group: int
    """Row tiles of an expert that take the same columns one after the other, while these are still
    in the L2 cache."""
    registers: int | None = None
    """Limit on a thread's registers, so that two programs fit on a multiprocessor."""


GATE_UP_TILES = Tiles(128, 64, 3, 8, group=8, registers=128)
GEMM_TILES = Tiles(128, 128, 3, 8, group=8, registers=128)
SMALL_GEMM_TILES = Tiles(64, 128, 4, 4, group=16)
DEPTH = 64
"""Numbers along the summed dimension that a tile multiplies at a time."""
FEW_ROWS = 256
"""Average rows per expert below which tiles are small."""
MANY_ROWS = 1024
"""Average rows per expert from which torch's product is as fast as ours."""


@triton.jit
def expert_rows(ends_ptr, experts, BM: tl.constexpr, EXPERTS: tl.constexpr):
    """Returns for each expert where its rows begin and end, and the number of tiles up to its
    end."""
    expert = tl.arange(0, EXPERTS)
    ends = tl.load(ends_ptr + tl.minimum(expert, experts - 1))
    starts = tl.load(ends_ptr + tl.minimum(expert, experts) - 1, expert > 0, other=0)
    return starts, ends, tl.cumsum((ends - starts + BM - 1) // BM)


@triton.jit
def tile_at(
    tile, across, starts, ends, last,
    BM: tl.constexpr, EXPERTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Returns the tile's expert, its first row, where the expert's rows end, and its block of
    columns."""
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
def store_tile(to_ptr, tile, row, end, column, width, stride, BM: tl.constexpr, BN: tl.constexpr):
    """Stores the rows before `end` and the columns before `width` of a tile."""
    down, right = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    corner_ptr = to_ptr + tl.cast(row, tl.int64) * stride + column
    mask = (row + down < end) & (column + right < width)
    tl.store(corner_ptr + down * stride + right, tile.to(to_ptr.dtype.element_ty), mask)


@triton.jit
def rows_kernel(
    x_desc, w_desc, out_ptr, ends_ptr, experts, N, K, height,
    TRANSPOSED: tl.constexpr, EXPERTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Computes x (M, K) times w (E, N, K) transposed, or (E, K, N). `height` is w's second
    dimension."""
    starts, ends, last = expert_rows(ends_ptr, experts, BM, EXPERTS)
    across = tl.cdiv(N, BN)
    for tile in range(tl.program_id(0), tl.max(last) * across, tl.num_programs(0)):
        e, row, end, block = tile_at(tile, across, starts, ends, last, BM, EXPERTS, GROUP)
        n = block * BN
        out = tl.zeros([BM, BN], tl.float32)
        for k in range(0, K, BK):
            x = x_desc.load([row, k])
            if TRANSPOSED:
                out = tl.dot(x, w_desc.load([e * height + n, k]).T, out)
            else:
                out = tl.dot(x, w_desc.load([e * height + k, n]), out)
        store_tile(out_ptr, out, row, end, n, N, N, BM, BN)


@triton.jit
def gate_up_kernel(
    x_desc, w_desc, gate_up_ptr, h_ptr, weight_ptr, ends_ptr, experts, F, K,
    EXPERTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Computes x (M, K) times w (2E, F, K) transposed, gate and up in one product, and silu(gate) *
    up of it."""
    starts, ends, last = expert_rows(ends_ptr, experts, BM, EXPERTS)
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
        store_tile(gate_up_ptr, gate, row, end, n, F, 2 * F, BM, BN)
        store_tile(gate_up_ptr, up, row, end, F + n, 2 * F, 2 * F, BM, BN)
        h = gate * tl.sigmoid(gate) * up * weight[:, None]
        store_tile(h_ptr, h, row, end, n, F, F, BM, BN)


def grouped_gemm(x_MK: Tensor, weight: Tensor, ends_E: Tensor, transposed: bool = False) -> Tensor:
    """Returns (M, N): the rows of x (M, K) from ends_E[e - 1] to ends_E[e] times expert e's weight
    (K, N), or (N, K) if `transposed`."""
    rows = len(x_MK) / len(ends_E)
    if rows >= MANY_ROWS:
        return F.grouped_mm(x_MK, weight.mT if transposed else weight, offs=ends_E)
    columns = weight.shape[1 if transposed else 2]
    tiles = SMALL_GEMM_TILES if rows < FEW_ROWS else GEMM_TILES
    out_MN = x_MK.new_empty(len(x_MK), columns)
    block = (tiles.columns, DEPTH) if transposed else (DEPTH, tiles.columns)
    rows_kernel[grid(x_MK, ends_E, columns, tiles)](
        block_descriptor(x_MK, tiles.rows, DEPTH), block_descriptor(weight.flatten(0, 1), *block),
        out_MN, ends_E, len(ends_E), columns, x_MK.shape[1], weight.shape[1], TRANSPOSED=transposed,
        EXPERTS=triton.next_power_of_2(len(ends_E)), **tile_options(tiles),
    )  # fmt: skip
    return out_MN


def gate_up(
    x_MK: Tensor, weight: Tensor, weight_M: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Multiplies x (M, K) by both projections of each row's expert (E, 2F, K). Returns the products
    (M, 2F), and silu(gate) * up (M, F) with each row times its float32 weight (M,)."""
    inner, tiles = weight.shape[1] // 2, GATE_UP_TILES
    each = weight.view(2 * len(ends_E), inner, -1)
    gate_up_MF, h_MF = x_MK.new_empty(len(x_MK), 2 * inner), x_MK.new_empty(len(x_MK), inner)
    gate_up_kernel[grid(x_MK, ends_E, inner, tiles)](
        block_descriptor(x_MK, tiles.rows, DEPTH), block_descriptor(each, 2, tiles.columns, DEPTH),
        gate_up_MF, h_MF, weight_M, ends_E, len(ends_E), inner, x_MK.shape[1],
        EXPERTS=triton.next_power_of_2(len(ends_E)), **tile_options(tiles),
    )  # fmt: skip
    return gate_up_MF, h_MF


def grouped_weight_grads(a_MP: Tensor, b_MQ: Tensor, ends_E: Tensor) -> Tensor:
    """Returns (E, P, Q): over the rows of each expert, a (M, P) transposed times b (M, Q)."""
    return F.grouped_mm(a_MP.T, b_MQ, offs=ends_E)


def block_descriptor(x: Tensor, *shape: int) -> TensorDescriptor:
    """Returns `x` as a tensor to be read in blocks of `shape`."""
    return TensorDescriptor.from_tensor(x, list(shape))


def grid(x_MK: Tensor, ends_E: Tensor, columns: int, tiles: Tiles) -> tuple[int]:
    """Returns the launch grid: a program for each tile, but no more than fit at once; each program
    then goes from tile to tile."""
    most = (len(x_MK) // tiles.rows + len(ends_E)) * triton.cdiv(columns, tiles.columns)
    return (min(most, resident_programs(x_MK.device)),)


@cache
def resident_programs(device: torch.device) -> int:
    """Returns how many programs run at once: two on each multiprocessor."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def tile_options(tiles: Tiles) -> dict[str, int | None]:
    """Returns the launch options that cut a product into `tiles`."""
    return {
        "BM": tiles.rows, "BN": tiles.columns, "BK": DEPTH, "GROUP": tiles.group,
        "num_stages": tiles.stages, "num_warps": tiles.warps, "maxnreg": tiles.registers,
    }  # fmt: skip
