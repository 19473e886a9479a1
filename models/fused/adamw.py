"""AdamW (1711.05101) on float32 masters from the gradients of their bf16 copies, in one pass over
all parameters; plain: torch.optim.AdamW after torch.nn.utils.clip_grad_norm_.

A master is its bf16 copy, rounded to nearest, and 16 bits more that say how far off that is: exact,
and 2 bytes less to read and write than both. A table on the device says where things lie: a row for
each chunk of a parameter, with the addresses of those bits, both moments, gradient and copy.
"""

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1 << 11
COLUMNS = ("low", "exp_avg", "exp_avg_sq", "grad", "copy")
GRAD = COLUMNS.index("grad")


@triton.jit
def address(table_ptr, row, COLUMN: tl.constexpr, KIND: tl.constexpr):
    return tl.load(table_ptr + row * 5 + COLUMN).to(tl.pointer_type(KIND))


@triton.jit
def places(ptr, at, WIDE: tl.constexpr):
    """WIDE: each eight begin at a multiple of 16 bytes. To say so of `ptr`, which was an integer,
    does not help: it is forgotten."""
    return tl.multiple_of(ptr + at, 16) if WIDE else ptr + at


@triton.jit
def size_of(size_ptr, row, WIDE: tl.constexpr):
    size = tl.load(size_ptr + row)
    return size // 8 * 8 if WIDE else size  # the same, but lets a mask be seen to go by eights


@triton.jit
def square_kernel(
    table_ptr, size_ptr, square_ptr, KIND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    here = at < size_of(size_ptr, row, WIDE)
    grad_at = places(address(table_ptr, row, 3, KIND), at, WIDE)
    grad = tl.load(grad_at, here, other=0.0).to(tl.float32)
    tl.store(square_ptr + row, tl.sum(grad * grad))


@triton.jit
def adamw_kernel(
    table_ptr, size_ptr, owner_ptr, bias1_ptr, bias2_ptr, pace_ptr, decay_ptr, eps_ptr,
    lr_ptr, clip_ptr, beta1, beta2,
    KIND: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Masters are SPLIT, or lie whole where their low bits are said to."""
    clip = tl.load(clip_ptr)
    if clip >= 0:  # it is not where the gradient is not finite
        row = tl.program_id(0).to(tl.int64)
        owner = tl.load(owner_ptr + row)
        lr = tl.load(lr_ptr) * tl.load(pace_ptr + owner)
        eps = tl.load(eps_ptr + owner)
        pace = lr / tl.load(bias1_ptr + owner)
        root = 1.0 / tl.sqrt(tl.load(bias2_ptr + owner))
        kept = 1.0 - lr * tl.load(decay_ptr + owner)
        at = tl.arange(0, BLOCK)
        here = at < size_of(size_ptr, row, WIDE)
        master_at = places(address(table_ptr, row, 0, tl.float32), at, WIDE)
        low_at = places(address(table_ptr, row, 0, tl.int16), at, WIDE)
        exp_avg_at = places(address(table_ptr, row, 1, tl.float32), at, WIDE)
        exp_avg_sq_at = places(address(table_ptr, row, 2, tl.float32), at, WIDE)
        grad_at = places(address(table_ptr, row, 3, KIND), at, WIDE)
        copy_at = places(address(table_ptr, row, 4, tl.int16), at, WIDE)
        grad = tl.load(grad_at, here, other=0.0).to(tl.float32) * clip
        if SPLIT:
            high = tl.load(copy_at, here, other=0).to(tl.int32) << 16
            master = (high + tl.load(low_at, here, other=0)).to(tl.float32, bitcast=True)
        else:
            master = tl.load(master_at, here, other=0.0)
        exp_avg = tl.load(exp_avg_at, here, other=0.0)
        exp_avg_sq = tl.load(exp_avg_sq_at, here, other=0.0)
        exp_avg += (1.0 - beta1) * (grad - exp_avg)
        exp_avg_sq = beta2 * exp_avg_sq + (1.0 - beta2) * grad * grad
        master = master * kept - pace * exp_avg / (tl.sqrt(exp_avg_sq) * root + eps)
        tl.store(exp_avg_at, exp_avg, here)
        tl.store(exp_avg_sq_at, exp_avg_sq, here)
        if SPLIT:
            bits = master.to(tl.int32, bitcast=True)
            high = (bits + 0x8000) >> 16
            tl.store(copy_at, high.to(tl.int16), here)
            tl.store(low_at, (bits - (high << 16)).to(tl.int16), here)
        else:
            tl.store(master_at, master, here)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> the nearest bf16, and int16: in units of the last bit of the float32, how far that
    is from it. (Of two as near, the one away from zero: the other may be 2^15 units off.)"""
    bits = master.view(torch.int32)
    high = (bits + 0x8000).bitwise_right_shift_(16)
    nearest = high.to(torch.int16).view(torch.bfloat16)
    low = (
        high.bitwise_left_shift_(16).neg_().add_(bits)
    )  # in place: it is done when memory is short
    return nearest, low.to(torch.int16)


def joined(copy: Tensor, low: Tensor) -> Tensor:
    """What `split` has split."""
    high = copy.contiguous().view(torch.int16).to(torch.int32) << 16
    return (high + low).view(torch.float32)


class Part(NamedTuple):
    """A parameter: what its master is, float32 moments, and where its gradient will be."""

    low: Tensor
    """The bits that `copy` lacks, or the float32 master itself where that is the leaf."""
    exp_avg: Tensor
    exp_avg_sq: Tensor
    leaf: Tensor
    """What the model computes with and has the gradient of: the master itself, or a bf16 copy that
    may hold other parameters too."""
    copy: Tensor
    """The view of `leaf` that is this parameter's."""


class Own(NamedTuple):
    """Settings of each parameter, by its number, float32."""

    pace: Tensor
    """What the learning rate is multiplied by."""
    decay: Tensor
    eps: Tensor


class Table:
    """The chunks of parameters whose leaves have one type; bf16 ones are copies."""

    def __init__(self, parts: dict[int, Part]):
        """`parts` by the number of the parameter."""
        self.leaves = list({id(part.leaf): part.leaf for part in parts.values()}.values())
        number = {id(leaf): i for i, leaf in enumerate(self.leaves)}
        rows, sizes, owners, leaves = [], [], [], []
        for owner, part in parts.items():
            low, size = part.low.data_ptr(), part.low.element_size()
            first = 0
            for run in [part.copy] if part.copy.is_contiguous() else part.copy:
                start = np.arange(0, run.numel(), CHUNK)
                at = first + start
                in_leaf = run.data_ptr() - part.leaf.data_ptr() + run.element_size() * start
                exp_avg, exp_avg_sq = part.exp_avg.data_ptr(), part.exp_avg_sq.data_ptr()
                lies = [low + size * at, exp_avg + 4 * at, exp_avg_sq + 4 * at, in_leaf]
                rows.append(np.stack([*lies, part.leaf.data_ptr() + in_leaf], 1))
                sizes.append(np.minimum(run.numel() - start, CHUNK))
                owners.append(np.full(len(start), owner))
                leaves.append(np.full(len(start), number[id(part.leaf)]))
                first += run.numel()
        leaf = self.leaves[0]
        self.addresses, self.leaf = np.concatenate(rows), np.concatenate(leaves)
        self.offset = self.addresses[:, GRAD].copy()  # they become addresses in `locate`
        chunks = np.concatenate(sizes).astype(np.int32)
        self.even = not (self.addresses % 16).any() and not (chunks % 8).any()
        self.table = torch.from_numpy(self.addresses).to(leaf.device)
        self.size = torch.from_numpy(chunks).to(leaf.device)
        self.owner = torch.from_numpy(np.concatenate(owners).astype(np.int32)).to(leaf.device)
        self.kind = tl.float32 if leaf.dtype == torch.float32 else tl.bfloat16

    def grads(self) -> list[int]:
        """Addresses of the leaves' gradients."""
        return [leaf.grad.data_ptr() for leaf in self.leaves]

    def locate(self, grads: list[int]) -> None:
        """From now on the gradients lie there."""
        self.addresses[:, GRAD] = np.array(grads)[self.leaf] + self.offset
        self.table.copy_(torch.from_numpy(self.addresses))

    def wide(self) -> bool:
        """Whether all can be read and written 16 bytes at a time: chunks, and the gradients that
        there are now, begin at multiples of that, and chunks end at multiples of 8 numbers."""
        return self.even and all(grad % 16 == 0 for grad in self.grads())

    def squares(self) -> Tensor:
        """Of the gradients, a sum for each chunk."""
        square = torch.empty(len(self.size), device=self.table.device)
        square_kernel[(len(self.size),)](
            self.table, self.size, square,
            KIND=self.kind, WIDE=self.wide(), BLOCK=CHUNK, num_warps=4,
        )  # fmt: skip
        return square

    def step(
        self,
        betas: tuple[float, float],
        biases: list[Tensor],
        own: Own,
        lr: Tensor,
        clip: Tensor,
    ) -> None:
        """`biases`, 1 - beta^steps, by the number of the parameter; gradients are multiplied by
        `clip`, and everything is left as it was where that is negative."""
        adamw_kernel[(len(self.size),)](
            self.table, self.size, self.owner, *biases, *own, lr, clip, *betas,
            KIND=self.kind, SPLIT=self.kind == tl.bfloat16, WIDE=self.wide(), BLOCK=CHUNK,
            num_warps=8,
        )  # fmt: skip
