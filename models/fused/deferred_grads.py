"""Gradients of all blocks' weights computed together, once the backward pass has been through them.

Products that are small one by one become one batched product of each kind, and the sums for all
gains become one launch. The plain definition is torch.nn.Linear and torch.nn.RMSNorm, each with a
gradient of its own.

In the forward pass a stand-in takes the place of each such weight. What the weight's gradient is
made of, the inputs of its product and the gradients of the product's outputs, is written straight
into the weight's slot of a table that all blocks share. The gradients are computed when autograd
reaches the stand-ins' own node, which comes after everything that uses them:

    deferred = deferred_weight_grads(model)          # one per forward pass
    weight, slot = linear_slot(block.attn.o_proj.weight, deferred)
    y = deferred_linear(x, weight, slot)             # its weight's gradient comes later
"""

from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn


@triton.jit
def column_sums_kernel(x_ptr, sum_ptr, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums each table (rows, width) over its rows; torch's own sum takes three times as long for
    tables this small."""
    x_ptr += tl.program_id(1).to(tl.int64) * rows * width
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (cols < width)[None, :]
        total += tl.load(x_ptr + row[:, None] * width + cols[None, :], mask, other=0.0)
    tl.store(sum_ptr + tl.program_id(1) * width + cols, tl.sum(total, 0), cols < width)


def column_sums(x_LNK: Tensor) -> Tensor:
    """Returns the sums over rows of (L, N, K): (L, K), float32."""
    layers, rows, width = x_LNK.shape
    sum_LK = x_LNK.new_empty(layers, width)
    column_sums_kernel[(triton.cdiv(width, 32), layers)](
        x_LNK, sum_LK, rows, width, ROWS=64, BLOCK=32
    )
    return sum_LK


class WeightGroup:
    """Weights (P, K), or gains, that play the same part in each block, and the tables from which
    their gradients are computed."""

    def __init__(self, weights: list[nn.Parameter]):
        self.weights = weights
        self.tables: dict[str, Tensor] = {}

    def row(self, table: str, index: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Returns the rows of one weight in a table, which is allocated when first asked for."""
        if table not in self.tables:
            shape = len(self.weights), *shape
            self.tables[table] = self.weights[0].new_empty(shape, dtype=dtype)
        return self.tables[table][index]

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Returns the gradient of each weight, None for all of them if no slot was written to."""
        if {"inputs", "output_grads"} <= self.tables.keys():
            return torch.bmm(self.tables["output_grads"].mT, self.tables["inputs"]).unbind()
        if "partial_sums" in self.tables:
            return column_sums(self.tables["partial_sums"]).unbind()
        return (None,) * len(self.weights)


class GradSlot(NamedTuple):
    """One weight's share of its group's tables."""

    group: WeightGroup
    index: int

    def inputs(self, rows: int, width: int) -> Tensor:
        """Returns where the inputs (N, K) of the weight's product belong, bf16."""
        return self.group.row("inputs", self.index, (rows, width), torch.bfloat16)

    def output_grads(self, rows: int, width: int) -> Tensor:
        """Returns where the gradients (N, P) of the product's outputs belong, bf16."""
        return self.group.row("output_grads", self.index, (rows, width), torch.bfloat16)

    def partial_sums(self, rows: int, width: int) -> Tensor:
        """Returns where partial sums (rows, K) of a gain's gradient belong, float32."""
        return self.group.row("partial_sums", self.index, (rows, width), torch.float32)


class NormSlots(NamedTuple):
    """A norm's own slot, and those of the products around it."""

    gain: GradSlot | None = None
    before: GradSlot | None = None
    """Slot of the product whose output the norm adds to the stream."""
    after: GradSlot | None = None
    """Slot of the product whose input the norm makes."""


class DeferredGrads(torch.autograd.Function):
    """Weights -> their stand-ins, whose gradients it computes after everything that uses them."""

    @staticmethod
    def forward(ctx, groups: list[WeightGroup], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.groups = groups
        ctx.set_materialize_grads(False)
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx, *direct: Tensor | None) -> tuple[Tensor | None, ...]:
        deferred: list[Tensor | None] = []
        for group in ctx.groups:
            deferred += group.gradients()
            del group.tables  # a second backward is an AttributeError
        pairs = zip(direct, deferred, strict=True)
        return None, *(later if own is None else own for own, later in pairs)


class DeferredWeights(NamedTuple):
    """The stand-ins of one forward pass, each with its slots, by the weight that it stands for."""

    linears: dict[Tensor, tuple[Tensor, GradSlot]]
    norms: dict[Tensor, tuple[Tensor, NormSlots]]


def linear_slot(weight: Tensor, deferred: DeferredWeights | None) -> tuple[Tensor, GradSlot | None]:
    """Returns what to multiply by in place of `weight`, and its slot, None if not deferred."""
    return (weight, None) if deferred is None else deferred.linears.get(weight, (weight, None))


def norm_slots(gain: Tensor, deferred: DeferredWeights | None) -> tuple[Tensor, NormSlots]:
    """Returns what to use in place of `gain`, and the slots around its norm."""
    none = gain, NormSlots()
    return none if deferred is None else deferred.norms.get(gain, none)


def deferred_weight_grads(model: nn.Module) -> DeferredWeights:
    """Returns stand-ins for the weights of a packed model's blocks, for one forward pass."""
    blocks = list(model.blocks)
    weights = {
        "qkv": [block.attn.packed for block in blocks],
        "out": [block.attn.o_proj.weight for block in blocks],
        "gain": [norm.weight for block in blocks for norm in (block.attn_norm, block.ffn_norm)],
    }
    weights["gain"].append(model.norm.weight)
    if not blocks[0].is_moe:
        weights["up"] = [block.mlp.packed for block in blocks]
        weights["down"] = [block.mlp.down_proj.weight for block in blocks]
    groups = {kind: WeightGroup(each) for kind, each in weights.items()}
    flat = list(chain.from_iterable(weights.values()))
    stand_ins = dict(zip(flat, DeferredGrads.apply(list(groups.values()), *flat), strict=True))
    slots = {
        kind: [GradSlot(group, index) for index in range(len(group.weights))]
        for kind, group in groups.items()
    }
    linears = {
        weight: (stand_ins[weight], slot)
        for kind in weights.keys() - {"gain"}
        for weight, slot in zip(weights[kind], slots[kind], strict=True)
    }
    none = [None] * len(blocks)
    before = [None, *interleave(slots["out"], slots.get("down", none))]
    after = [*interleave(slots["qkv"], slots.get("up", none)), None]
    norms = {
        gain: (stand_ins[gain], NormSlots(*around))
        for gain, *around in zip(weights["gain"], slots["gain"], before, after, strict=True)
    }
    return DeferredWeights(linears, norms)


def interleave(first: list, second: list) -> chain:
    """Returns first[0], second[0], first[1], second[1], ..."""
    return chain.from_iterable(zip(first, second, strict=True))


class DeferredLinear(torch.autograd.Function):
    """x (..., K), weight (P, K) -> (..., P), the weight's gradient left to DeferredGrads."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, slot: GradSlot) -> Tensor:
        x_NK = x.flatten(0, -2)
        write_to(slot.inputs(*x_NK.shape), x_NK)
        ctx.save_for_backward(weight)
        ctx.slot = slot
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        grad_NP = grad.flatten(0, -2)
        write_to(ctx.slot.output_grads(*grad_NP.shape), grad_NP)
        return grad @ weight, None, None


def write_to(target: Tensor, x: Tensor) -> None:
    """Copies `x` into `target`, unless it was computed there."""
    if x.data_ptr() != target.data_ptr():
        target.copy_(x)


def deferred_linear(x: Tensor, weight: Tensor, slot: GradSlot | None) -> Tensor:
    """Returns x (..., K) times weight (P, K): (..., P); with a slot the weight's gradient waits."""
    return F.linear(x, weight) if slot is None else DeferredLinear.apply(x, weight, slot)
