"""Gradients of the weights of all blocks at once, when the backward pass has been through them all:
products that are small one by one become one batched product of each kind, and the sums for all
gains one launch. Plain: torch.nn.Linear and torch.nn.RMSNorm, each with a gradient of its own.

Within `together` a stand-in takes the place of each such weight. What its gradient is made of, the
inputs of its product and the slopes of the outputs, is written straight into its row of a table of
all blocks; the gradients follow when autograd comes to the stand-ins' own node.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn


@triton.jit
def column_sums_kernel(x_ptr, sum_ptr, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Torch's own takes three times as long for tables this small."""
    x_ptr += tl.program_id(1).to(tl.int64) * rows * width
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (cols < width)[None, :]
        total += tl.load(x_ptr + row[:, None] * width + cols[None, :], mask, other=0.0)
    tl.store(sum_ptr + tl.program_id(1) * width + cols, tl.sum(total, 0), cols < width)


def column_sums(x_LNK: Tensor) -> Tensor:
    """(L, N, K) -> (L, K), float32."""
    layers, rows, width = x_LNK.shape
    sum_LK = x_LNK.new_empty(layers, width)
    column_sums_kernel[(triton.cdiv(width, 32), layers)](
        x_LNK, sum_LK, rows, width, ROWS=64, BLOCK=32
    )
    return sum_LK


class Kind:
    """Weights that do the same in each block: of products (P, K), or gains."""

    def __init__(self, weights: list[nn.Parameter]):
        self.weights = weights
        self.tables: dict[str, Tensor] = {}

    def row(self, table: str, number: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        if table not in self.tables:
            shape = len(self.weights), *shape
            self.tables[table] = self.weights[0].new_empty(shape, dtype=dtype)
        return self.tables[table][number]

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Of each weight; None where they have not been left to this."""
        if {"slopes", "inputs"} <= self.tables.keys():
            return torch.bmm(self.tables["slopes"].mT, self.tables["inputs"]).unbind()
        if "sums" in self.tables:
            return column_sums(self.tables["sums"]).unbind()
        return (None,) * len(self.weights)


class Row(NamedTuple):
    """One weight's share of the tables."""

    kind: Kind
    number: int

    def inputs(self, rows: int, width: int) -> Tensor:
        """Of its product, (N, K)."""
        return self.kind.row("inputs", self.number, (rows, width), torch.bfloat16)

    def slopes(self, rows: int, width: int) -> Tensor:
        """Of its product's outputs, (N, P)."""
        return self.kind.row("slopes", self.number, (rows, width), torch.bfloat16)

    def sums(self, rows: int, width: int) -> Tensor:
        """Parts of a gain's gradient."""
        return self.kind.row("sums", self.number, (rows, width), torch.float32)


class Norm(NamedTuple):
    """What a norm stands between."""

    own: Row | None = None
    before: Row | None = None
    """Of the product whose output it adds to the stream."""
    after: Row | None = None
    """Of the product whose input it makes."""


class Late(torch.autograd.Function):
    """Weights -> their stand-ins, whose gradients it makes when all else has been through."""

    @staticmethod
    def forward(ctx, kinds: list[Kind], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.kinds = kinds
        ctx.set_materialize_grads(False)
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx, *own: Tensor | None) -> tuple[Tensor | None, ...]:
        late: list[Tensor | None] = []
        for kind in ctx.kinds:
            late += kind.gradients()
            del kind.tables  # a second backward is an AttributeError
        return None, *(b if a is None else a for a, b in zip(own, late, strict=True))


standing: dict[Tensor, Tensor] = {}
"""Stand-ins, by what they stand for."""


def stand_in(weight: Tensor) -> Tensor:
    """What to compute with in place of `weight`: itself, but within `together`."""
    return standing.get(weight, weight)


def row_of(weight: Tensor) -> Row | None:
    return getattr(weight, "row", None)


def norm_of(gain: Tensor) -> Norm:
    return getattr(gain, "norm_row", Norm())


@contextmanager
def together(model: nn.Module) -> Iterator[None]:
    """A forward pass within leaves the gradients of the weights of its blocks to Late."""
    assert not standing, "one forward pass at a time"
    blocks = list(model.blocks)
    kinds = {
        "qkv": [block.attn.packed for block in blocks],
        "out": [block.attn.o_proj.weight for block in blocks],
        "gain": [norm.weight for block in blocks for norm in (block.attn_norm, block.ffn_norm)],
    }
    kinds["gain"].append(model.norm.weight)
    if not blocks[0].is_moe:
        kinds["up"] = [block.mlp.packed for block in blocks]
        kinds["down"] = [block.mlp.down_proj.weight for block in blocks]
    weights = list(chain.from_iterable(kinds.values()))
    late = [Kind(each) for each in kinds.values()]
    standing.update(zip(weights, Late.apply(late, *weights), strict=True))

    rows = {
        name: [Row(kind, i) for i in range(len(kind.weights))]
        for name, kind in zip(kinds, late, strict=True)
    }
    for name, each in kinds.items():
        for weight, row in zip(each, rows[name], strict=True):
            standing[weight].row = row
    nothing = [None] * len(blocks)
    before = [None, *in_turn(rows["out"], rows.get("down", nothing))]
    after = [*in_turn(rows["qkv"], rows.get("up", nothing)), None]
    for gain, *places in zip(kinds["gain"], rows["gain"], before, after, strict=True):
        standing[gain].norm_row = Norm(*places)
    try:
        yield
    finally:
        standing.clear()


def in_turn(one: list, other: list) -> Iterator:
    return chain.from_iterable(zip(one, other, strict=True))


class Linear(torch.autograd.Function):
    """x (..., K), weight (P, K) -> (..., P), the weight's gradient left to Late."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, row: Row) -> Tensor:
        x_NK = x.flatten(0, -2)
        move(x_NK, row.inputs(*x_NK.shape))
        ctx.save_for_backward(weight)
        ctx.row = row
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        grad_NP = grad.flatten(0, -2)
        move(grad_NP, ctx.row.slopes(*grad_NP.shape))
        return grad @ weight, None, None


def move(x: Tensor, to: Tensor) -> None:
    """Does nothing where `x` has been made there."""
    if x.data_ptr() != to.data_ptr():
        to.copy_(x)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K), weight (P, K) or its stand-in -> (..., P)."""
    row = row_of(weight)
    return F.linear(x, weight) if row is None else Linear.apply(x, weight, row)
