"""AdamW (1711.05101) on float32 masters from the gradients of their bf16 copies, in one pass over
all parameters; plain: torch.optim.AdamW after torch.nn.utils.clip_grad_norm_.

A table on the device says where things lie: a row for each chunk of a parameter, with the addresses
of master, both moments, gradient and copy.
"""

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1 << 12
COLUMNS = ("master", "exp_avg", "exp_avg_sq", "grad", "copy")


@triton.jit
def address(table_ptr, row, COLUMN: tl.constexpr, KIND: tl.constexpr):
    return tl.load(table_ptr + row * 5 + COLUMN).to(tl.pointer_type(KIND))


@triton.jit
def square_kernel(table_ptr, size_ptr, square_ptr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    size = tl.load(size_ptr + row)
    grad_ptr = address(table_ptr, row, 3, KIND)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + at, at < size, other=0.0).to(tl.float32)
        total += grad * grad
    tl.store(square_ptr + row, tl.sum(total))


@triton.jit
def adamw_kernel(
    table_ptr, size_ptr, owner_ptr, bias1_ptr, bias2_ptr, pace_ptr, decay_ptr, eps_ptr,
    lr_ptr, clip_ptr, beta1, beta2,
    KIND: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    clip = tl.load(clip_ptr)
    if clip >= 0:  # it is not where the gradient is not finite
        row = tl.program_id(0).to(tl.int64)
        size = tl.load(size_ptr + row)
        owner = tl.load(owner_ptr + row)
        lr = tl.load(lr_ptr) * tl.load(pace_ptr + owner)
        eps = tl.load(eps_ptr + owner)
        pace = lr / tl.load(bias1_ptr + owner)
        root = 1.0 / tl.sqrt(tl.load(bias2_ptr + owner))
        kept = 1.0 - lr * tl.load(decay_ptr + owner)
        master_ptr = address(table_ptr, row, 0, tl.float32)
        exp_avg_ptr = address(table_ptr, row, 1, tl.float32)
        exp_avg_sq_ptr = address(table_ptr, row, 2, tl.float32)
        grad_ptr = address(table_ptr, row, 3, KIND)
        for start in range(0, size, BLOCK):
            at = start + tl.arange(0, BLOCK)
            here = at < size
            grad = tl.load(grad_ptr + at, here, other=0.0).to(tl.float32) * clip
            master = tl.load(master_ptr + at, here, other=0.0)
            exp_avg = tl.load(exp_avg_ptr + at, here, other=0.0)
            exp_avg_sq = tl.load(exp_avg_sq_ptr + at, here, other=0.0)
            exp_avg += (1.0 - beta1) * (grad - exp_avg)
            exp_avg_sq = beta2 * exp_avg_sq + (1.0 - beta2) * grad * grad
            master = master * kept - pace * exp_avg / (tl.sqrt(exp_avg_sq) * root + eps)
            tl.store(master_ptr + at, master, here)
            tl.store(exp_avg_ptr + at, exp_avg, here)
            tl.store(exp_avg_sq_ptr + at, exp_avg_sq, here)
            if COPY:
                copy_ptr = address(table_ptr, row, 4, KIND)
                tl.store(copy_ptr + at, master.to(KIND), here)


class Part(NamedTuple):
    """A parameter: float32 master and moments, and where its gradient will be."""

    master: Tensor
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
        rows, sizes, owners, leaves, offsets = [], [], [], [], []
        for owner, part in parts.items():
            master = part.master.data_ptr()
            first = 0
            for run in [part.copy] if part.copy.is_contiguous() else part.copy:
                start = np.arange(0, run.numel(), CHUNK)
                at = 4 * (first + start)
                in_leaf = run.data_ptr() - part.leaf.data_ptr() + run.element_size() * start
                exp_avg, exp_avg_sq = part.exp_avg.data_ptr(), part.exp_avg_sq.data_ptr()
                lies = [master + at, exp_avg + at, exp_avg_sq + at, 0 * at]
                rows.append(np.stack([*lies, part.leaf.data_ptr() + in_leaf], 1))
                sizes.append(np.minimum(run.numel() - start, CHUNK))
                owners.append(np.full(len(start), owner))
                leaves.append(np.full(len(start), number[id(part.leaf)]))
                offsets.append(in_leaf)
                first += run.numel()
        leaf = self.leaves[0]
        self.addresses, self.leaf = np.concatenate(rows), np.concatenate(leaves)
        self.offset = np.concatenate(offsets)
        self.table = torch.from_numpy(self.addresses).to(leaf.device)
        self.size = torch.from_numpy(np.concatenate(sizes).astype(np.int32)).to(leaf.device)
        self.owner = torch.from_numpy(np.concatenate(owners).astype(np.int32)).to(leaf.device)
        self.kind = tl.float32 if leaf.dtype == torch.float32 else tl.bfloat16

    def grads(self) -> list[int]:
        """Addresses of the leaves' gradients."""
        return [leaf.grad.data_ptr() for leaf in self.leaves]

    def locate(self, grads: list[int]) -> None:
        """From now on the gradients lie there."""
        self.addresses[:, COLUMNS.index("grad")] = np.array(grads)[self.leaf] + self.offset
        self.table.copy_(torch.from_numpy(self.addresses))

    def squares(self) -> Tensor:
        """Of the gradients, a sum for each chunk."""
        square = torch.empty(len(self.size), device=self.table.device)
        square_kernel[(len(self.size),)](
            self.table, self.size, square, KIND=self.kind, BLOCK=2048, num_warps=4
        )
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
            KIND=self.kind, COPY=self.kind == tl.bfloat16, BLOCK=1024, num_warps=8,
        )  # fmt: skip
