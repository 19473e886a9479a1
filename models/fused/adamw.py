"""AdamW (arXiv:1711.05101) on float32 master weights from the gradients of their bf16 copies, in
one pass over all parameters. The plain definition is torch.optim.AdamW after clip_grad_norm_.

A master weight is stored as its bf16 copy, rounded to nearest, and 16 bits more that say how far
off that is: exact, and 2 bytes less to read and write than both. A table on the device has a row
for each chunk of a parameter, with the addresses of those low bits, both moments, gradient and
copy.

    high, low = split_master(torch.tensor([1.0001]))   # 1.0 in bf16, and 839 units of 2^-23
    join_master(high, low)                             # 1.0001 again, bit for bit
"""

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1 << 11
"""Numbers of a parameter that one program updates."""
TABLE_COLUMNS = ("low", "exp_avg", "exp_avg_sq", "grad", "copy")
GRAD = TABLE_COLUMNS.index("grad")


@triton.jit
def address(table_ptr, row, COLUMN: tl.constexpr, DTYPE: tl.constexpr):
    """Returns the pointer in one column of a row of the table."""
    return tl.load(table_ptr + row * 5 + COLUMN).to(tl.pointer_type(DTYPE))


@triton.jit
def elements(ptr, at, WIDE: tl.constexpr):
    """Returns pointers to the elements `at`. WIDE says that each eight begin at a multiple of 16
    bytes; the compiler forgets the same hint on `ptr`, which was an integer."""
    return tl.multiple_of(ptr + at, 16) if WIDE else ptr + at


@triton.jit
def chunk_size(size_ptr, row, WIDE: tl.constexpr):
    """Returns the number of elements in a row's chunk."""
    size = tl.load(size_ptr + row)
    return size // 8 * 8 if WIDE else size  # equal, but the compiler sees masks of whole eights


@triton.jit
def square_kernel(
    table_ptr, size_ptr, square_ptr, DTYPE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums the squared gradients of one chunk."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    here = at < chunk_size(size_ptr, row, WIDE)
    grad_at = elements(address(table_ptr, row, 3, DTYPE), at, WIDE)
    grad = tl.load(grad_at, here, other=0.0).to(tl.float32)
    tl.store(square_ptr + row, tl.sum(grad * grad))


@triton.jit
def adamw_kernel(
    table_ptr, size_ptr, owner_ptr, bias1_ptr, bias2_ptr, lr_scale_ptr, decay_ptr, eps_ptr,
    lr_ptr, clip_ptr, beta1, beta2,
    DTYPE: tl.constexpr, IS_SPLIT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Updates one chunk, whose gradient is in DTYPE. IS_SPLIT: the master is a copy and its low
    bits; otherwise it lies whole where the table has the low bits."""
    clip = tl.load(clip_ptr)
    if clip >= 0:  # negative where the gradient is not finite
        row = tl.program_id(0).to(tl.int64)
        owner = tl.load(owner_ptr + row)
        lr = tl.load(lr_ptr) * tl.load(lr_scale_ptr + owner)
        eps = tl.load(eps_ptr + owner)
        step_size = lr / tl.load(bias1_ptr + owner)
        root = 1.0 / tl.sqrt(tl.load(bias2_ptr + owner))
        keep = 1.0 - lr * tl.load(decay_ptr + owner)
        at = tl.arange(0, BLOCK)
        here = at < chunk_size(size_ptr, row, WIDE)
        master_at = elements(address(table_ptr, row, 0, tl.float32), at, WIDE)
        low_at = elements(address(table_ptr, row, 0, tl.int16), at, WIDE)
        exp_avg_at = elements(address(table_ptr, row, 1, tl.float32), at, WIDE)
        exp_avg_sq_at = elements(address(table_ptr, row, 2, tl.float32), at, WIDE)
        grad_at = elements(address(table_ptr, row, 3, DTYPE), at, WIDE)
        copy_at = elements(address(table_ptr, row, 4, tl.int16), at, WIDE)
        grad = tl.load(grad_at, here, other=0.0).to(tl.float32) * clip
        if IS_SPLIT:
            high = tl.load(copy_at, here, other=0).to(tl.int32) << 16
            master = (high + tl.load(low_at, here, other=0)).to(tl.float32, bitcast=True)
        else:
            master = tl.load(master_at, here, other=0.0)
        exp_avg = tl.load(exp_avg_at, here, other=0.0)
        exp_avg_sq = tl.load(exp_avg_sq_at, here, other=0.0)
        exp_avg += (1.0 - beta1) * (grad - exp_avg)
        exp_avg_sq = beta2 * exp_avg_sq + (1.0 - beta2) * grad * grad
        master = master * keep - step_size * exp_avg / (tl.sqrt(exp_avg_sq) * root + eps)
        tl.store(exp_avg_at, exp_avg, here)
        tl.store(exp_avg_sq_at, exp_avg_sq, here)
        if IS_SPLIT:
            bits = master.to(tl.int32, bitcast=True)
            high = (bits + 0x8000) >> 16
            tl.store(copy_at, high.to(tl.int16), here)
            tl.store(low_at, (bits - (high << 16)).to(tl.int16), here)
        else:
            tl.store(master_at, master, here)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """Splits float32 into the nearest bf16, and int16 that says how far off that is in units of the
    float32's last bit. Ties round away from zero, because the other neighbour may be 2^15 units
    off, which int16 cannot hold."""
    bits = master.view(torch.int32)
    high = (bits + 0x8000).bitwise_right_shift_(16)
    nearest = high.to(torch.int16).view(torch.bfloat16)
    low = high.bitwise_left_shift_(16).neg_().add_(bits)  # in place, because memory is short here
    return nearest, low.to(torch.int16)


def join_master(copy: Tensor, low: Tensor) -> Tensor:
    """Returns the float32 that `split_master` has split."""
    high = copy.contiguous().view(torch.int16).to(torch.int32) << 16
    return (high + low).view(torch.float32)


class MasterPart(NamedTuple):
    """One parameter's tensors: its master weight, float32 moments, and where its gradient will
    be."""

    low: Tensor
    """The bits that `copy` lacks, int16, or the float32 master itself where that is the leaf."""
    exp_avg: Tensor
    exp_avg_sq: Tensor
    leaf: Tensor
    """What the model computes with and autograd fills the gradient of: the master itself, or a bf16
    copy that may hold other parameters too."""
    copy: Tensor
    """This parameter's view of `leaf`."""


class SettingTensors(NamedTuple):
    """AdamW's settings of each parameter, float32, by the parameter's number."""

    lr_scale: Tensor
    """Factor on the learning rate."""
    weight_decay: Tensor
    eps: Tensor


class ChunkTable:
    """The chunks of all parameters whose leaves have one dtype; bf16 leaves are copies."""

    def __init__(self, parts: dict[int, MasterPart]):
        """`parts` is by the number of the parameter."""
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
                columns = [low + size * at, exp_avg + 4 * at, exp_avg_sq + 4 * at, in_leaf]
                rows.append(np.stack([*columns, part.leaf.data_ptr() + in_leaf], 1))
                sizes.append(np.minimum(run.numel() - start, CHUNK))
                owners.append(np.full(len(start), owner))
                leaves.append(np.full(len(start), number[id(part.leaf)]))
                first += run.numel()
        leaf = self.leaves[0]
        self.addresses, self.leaf = np.concatenate(rows), np.concatenate(leaves)
        grad_dtype = leaf.grad_dtype or leaf.dtype
        # `locate_grads` makes addresses of these; a gradient may be wider than its leaf.
        self.offset = self.addresses[:, GRAD] * (grad_dtype.itemsize // leaf.element_size())
        chunks = np.concatenate(sizes).astype(np.int32)
        self.is_aligned = not (self.addresses % 16).any() and not (chunks % 8).any()
        self.table = torch.from_numpy(self.addresses).to(leaf.device)
        self.size = torch.from_numpy(chunks).to(leaf.device)
        self.owner = torch.from_numpy(np.concatenate(owners).astype(np.int32)).to(leaf.device)
        self.is_split = leaf.dtype == torch.bfloat16
        self.grad_dtype = tl.float32 if grad_dtype == torch.float32 else tl.bfloat16

    def grad_addresses(self) -> list[int]:
        """Returns the addresses of the leaves' gradients."""
        return [leaf.grad.data_ptr() for leaf in self.leaves]

    def locate_grads(self, grads: list[int]) -> None:
        """Tells the device the addresses of the leaves' gradients."""
        self.addresses[:, GRAD] = np.array(grads)[self.leaf] + self.offset
        self.table.copy_(torch.from_numpy(self.addresses))

    def is_wide(self) -> bool:
        """Whether everything can be read and written 16 bytes at a time: chunks and the current
        gradients begin at multiples of 16 bytes, and chunks are whole eights of numbers."""
        return self.is_aligned and all(grad % 16 == 0 for grad in self.grad_addresses())

    def grad_squares(self) -> Tensor:
        """Returns the sum of the squared gradients of each chunk, float32."""
        square = torch.empty(len(self.size), device=self.table.device)
        square_kernel[(len(self.size),)](
            self.table, self.size, square,
            DTYPE=self.grad_dtype, WIDE=self.is_wide(), BLOCK=CHUNK, num_warps=4,
        )  # fmt: skip
        return square

    def step(
        self,
        betas: tuple[float, float],
        biases: list[Tensor],
        settings: SettingTensors,
        lr: Tensor,
        clip: Tensor,
    ) -> None:
        """Updates every chunk. `biases` are 1 - beta^steps by the number of the parameter.
        Gradients are multiplied by `clip`; a negative one leaves everything as it was."""
        adamw_kernel[(len(self.size),)](
            self.table, self.size, self.owner, *biases, *settings, lr, clip, *betas,
            DTYPE=self.grad_dtype, IS_SPLIT=self.is_split, WIDE=self.is_wide(), BLOCK=CHUNK,
            num_warps=8,
        )  # fmt: skip
