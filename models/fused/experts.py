"""A mixture-of-experts layer with its routing, sorting and activation fused around the grouped
products; plain: models.moe.

Rows of a block of tokens are counted per expert (`route`), then each choice is given its row in
the order of the experts (`place`). B blocks of ROWS tokens.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.fused.products import gate_up, grouped, grouped_weights
from models.fused.swiglu import swiglu_backward

ROWS = 64
"""Tokens that one program routes."""


@triton.jit
def route_kernel(
    x_ptr, router_ptr, logits_ptr, chosen_ptr, weight_ptr, count_ptr, chance_ptr, z_ptr,
    tokens, width, experts,
    CHOICES: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    rows = block * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS)
    here = rows < tokens
    logits = tl.zeros([ROWS, EXPERTS], tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(
            x_ptr + rows.to(tl.int64)[:, None] * width + cols[None, :],
            here[:, None] & (cols < width)[None, :], other=0.0,
        )  # fmt: skip
        router = tl.load(
            router_ptr + expert[None, :] * width + cols[:, None],
            (expert < experts)[None, :] & (cols < width)[:, None], other=0.0,
        )  # fmt: skip
        # Two bf16 pieces keep 16 bits of a weight; what the sum loses is more.
        rough = router.to(x.dtype)
        logits = tl.dot(x, rough, logits)
        logits = tl.dot(x, (router - rough.to(tl.float32)).to(x.dtype), logits)
    at = rows[:, None] * experts + expert[None, :]
    known = here[:, None] & (expert < experts)[None, :]
    tl.store(logits_ptr + at, logits, known)

    logits = tl.where((expert < experts)[None, :], logits, float("-inf"))
    top = tl.max(logits, 1)
    open = tl.exp(logits - top[:, None])
    total = tl.sum(open, 1)
    chance = tl.where(here[:, None], open / total[:, None], 0.0)
    tl.store(chance_ptr + block * EXPERTS + expert, tl.sum(chance, 0))
    log_sum = tl.where(here, top + tl.log(total), 0.0)
    tl.store(z_ptr + block, tl.sum(log_sum * log_sum))

    left = logits
    for _ in tl.static_range(CHOICES):
        best = tl.argmax(left, 1)
        left = tl.where(expert[None, :] == best[:, None], float("-inf"), left)
    is_chosen = (left != logits) & here[:, None]
    chosen_total = tl.sum(tl.where(is_chosen, open, 0.0), 1)
    count = tl.sum(is_chosen.to(tl.int32), 0)
    left = logits
    for choice in tl.static_range(CHOICES):
        best = tl.argmax(left, 1)
        weight = tl.exp(tl.max(left, 1) - top) / chosen_total
        tl.store(chosen_ptr + rows * CHOICES + choice, best.to(tl.int64), here)
        tl.store(weight_ptr + rows * CHOICES + choice, weight, here)
        left = tl.where(expert[None, :] == best[:, None], float("-inf"), left)
    tl.store(count_ptr + block * EXPERTS + expert, count)


@triton.jit
def place_kernel(
    chosen_ptr, weight_ptr, count_ptr, chance_ptr, z_ptr,
    row_ptr, token_ptr, sorted_ptr, ends_ptr, load_ptr, balance_ptr, z_mean_ptr,
    tokens, experts, blocks,
    CHOICES: tl.constexpr, ROWS: tl.constexpr, EACH: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    total = tl.zeros([EXPERTS], tl.int32)
    before = tl.zeros([EXPERTS], tl.int32)
    for start in range(0, blocks, BLOCKS):
        other = start + tl.arange(0, BLOCKS)
        count = tl.load(
            count_ptr + other[:, None] * EXPERTS + expert[None, :],
            (other < blocks)[:, None], other=0,
        )  # fmt: skip
        total += tl.sum(count, 0)
        before += tl.sum(tl.where((other < block)[:, None], count, 0), 0)
    ends = tl.cumsum(total, 0)
    first = ends - total + before

    each = tl.arange(0, EACH)
    choice = block * ROWS * CHOICES + each
    here = (each < ROWS * CHOICES) & (choice < tokens * CHOICES)
    chosen = tl.load(chosen_ptr + choice, here, other=0).to(tl.int32)
    is_chosen = (chosen[:, None] == expert[None, :]) & here[:, None]
    nth = tl.cumsum(is_chosen.to(tl.int32), 0) - 1
    row = tl.sum(tl.where(is_chosen, nth + first[None, :], 0), 1)
    tl.store(row_ptr + choice, row, here)
    tl.store(token_ptr + row, choice // CHOICES, here)
    tl.store(sorted_ptr + row, tl.load(weight_ptr + choice, here, other=0.0), here)

    if block == 0:
        chance = tl.zeros([EXPERTS], tl.float32)
        z = 0.0
        for start in range(0, blocks, BLOCKS):
            other = start + tl.arange(0, BLOCKS)
            chance += tl.sum(tl.load(
                chance_ptr + other[:, None] * EXPERTS + expert[None, :],
                (other < blocks)[:, None], other=0.0,
            ), 0)  # fmt: skip
            z += tl.sum(tl.load(z_ptr + other, other < blocks, other=0.0))
        share = total.to(tl.float32) / tokens
        tl.store(ends_ptr + expert, ends, expert < experts)
        tl.store(load_ptr + expert, share / CHOICES, expert < experts)
        tl.store(balance_ptr, experts * tl.sum(share * chance) / tokens)
        tl.store(z_mean_ptr, z / tokens)


@triton.jit
def route_backward_kernel(
    logits_ptr, row_ptr, chosen_ptr, weight_ptr, grad_sorted_ptr, load_ptr,
    grad_balance_ptr, grad_z_ptr, grad_logits_ptr, tokens, experts,
    CHOICES: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS)
    here = rows < tokens
    at = rows[:, None] * experts + expert[None, :]
    known = here[:, None] & (expert < experts)[None, :]
    logits = tl.load(logits_ptr + at, known, other=float("-inf"))
    top = tl.where(here, tl.max(logits, 1), 0.0)
    open = tl.exp(logits - top[:, None])
    total = tl.where(here, tl.sum(open, 1), 1.0)
    chance = open / total[:, None]
    log_sum = top + tl.log(total)

    share = tl.load(load_ptr + expert, expert < experts, other=0.0) * CHOICES
    balance = tl.load(grad_balance_ptr) * experts / tokens
    grad = balance * chance * (share[None, :] - tl.sum(chance * share[None, :], 1)[:, None])
    grad += (tl.load(grad_z_ptr) * 2.0 / tokens) * log_sum[:, None] * chance

    along = tl.zeros([ROWS], tl.float32)
    for choice in tl.static_range(CHOICES):
        place = rows * CHOICES + choice
        weight = tl.load(weight_ptr + place, here, other=0.0)
        along += weight * tl.load(grad_sorted_ptr + tl.load(row_ptr + place, here, other=0), here)
    for choice in tl.static_range(CHOICES):
        place = rows * CHOICES + choice
        weight = tl.load(weight_ptr + place, here, other=0.0)
        slope = tl.load(grad_sorted_ptr + tl.load(row_ptr + place, here, other=0), here)
        is_chosen = tl.load(chosen_ptr + place, here, other=0)[:, None] == expert[None, :]
        grad += tl.where(is_chosen, (weight * (slope - along))[:, None], 0.0)
    tl.store(grad_logits_ptr + at, grad, known)


@triton.jit
def gather_kernel(x_ptr, token_ptr, out_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    token = tl.load(token_ptr + row).to(tl.int64)
    tl.store(out_ptr + row * width + cols, tl.load(x_ptr + token * width + cols, mask), mask)


@triton.jit
def combine_kernel(
    y_ptr, row_ptr, grad_logits_ptr, router_ptr, out_ptr, width, experts,
    CHOICES: tl.constexpr, ROUTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up each token's rows and, going back, what reaches it through the router."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    out = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(CHOICES):
        row = tl.load(row_ptr + token * CHOICES + choice).to(tl.int64)
        out += tl.load(y_ptr + row * width + cols, mask, other=0.0).to(tl.float32)
    if ROUTED:
        for expert in range(0, experts):
            slope = tl.load(grad_logits_ptr + token * experts + expert)
            out += slope * tl.load(router_ptr + expert * width + cols, mask, other=0.0)
    tl.store(out_ptr + token * width + cols, out.to(out_ptr.dtype.element_ty), mask)


class Route(NamedTuple):
    """What the router did with a batch, and where its choices' rows lie."""

    logits_NE: Tensor
    chosen_NC: Tensor
    weight_NC: Tensor
    row_NC: Tensor
    """Where each choice lies among the rows sorted by expert, int32."""
    token_M: Tensor
    """Whose choice each sorted row is, int32."""
    weight_M: Tensor
    ends_E: Tensor
    load_E: Tensor
    balance: Tensor
    z: Tensor


def route(x_ND: Tensor, router_ED: Tensor, choices: int) -> Route:
    """The choices of each token, sorted by expert; plain: models.moe.Router."""
    tokens, (experts, width) = len(x_ND), router_ED.shape
    blocks, padded = triton.cdiv(tokens, ROWS), max(16, triton.next_power_of_2(experts))
    exact, whole = router_ED.new_empty, router_ED.new_empty
    found = Route(
        logits_NE=exact(tokens, experts),
        chosen_NC=whole(tokens, choices, dtype=torch.int64),
        weight_NC=exact(tokens, choices),
        row_NC=whole(tokens, choices, dtype=torch.int32),
        token_M=whole(tokens * choices, dtype=torch.int32),
        weight_M=exact(tokens * choices),
        ends_E=whole(experts, dtype=torch.int32),
        load_E=exact(experts),
        balance=exact(()),
        z=exact(()),
    )
    count, chance = whole(blocks, padded, dtype=torch.int32), exact(blocks, padded)
    z = exact(blocks)
    route_kernel[(blocks,)](
        x_ND, router_ED, found.logits_NE, found.chosen_NC, found.weight_NC, count, chance, z,
        tokens, width, experts, CHOICES=choices, ROWS=ROWS, EXPERTS=padded, BLOCK=128,
    )  # fmt: skip
    place_kernel[(blocks,)](
        found.chosen_NC, found.weight_NC, count, chance, z,
        found.row_NC, found.token_M, found.weight_M,
        found.ends_E, found.load_E, found.balance, found.z,
        tokens, experts, blocks, CHOICES=choices, ROWS=ROWS,
        EACH=triton.next_power_of_2(ROWS * choices), EXPERTS=padded, BLOCKS=128,
    )  # fmt: skip
    return found


def gather(x_ND: Tensor, token_M: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(N, D) -> (M, D), the row of each choice's token; in x's own type if none is given."""
    out_MD = x_ND.new_empty(len(token_M), x_ND.shape[1], dtype=dtype)
    gather_kernel[(len(token_M),)](
        x_ND, token_M, out_MD, x_ND.shape[1], BLOCK=triton.next_power_of_2(x_ND.shape[1])
    )
    return out_MD


def combine(
    y_MD: Tensor, row_NC: Tensor, slope_NE: Tensor | None = None, router_ED: Tensor | None = None
) -> Tensor:
    """(M, D) -> (N, D), the sum over each token's choices, plus the router's slope where given."""
    tokens, choices = row_NC.shape
    experts, width = 0 if router_ED is None else len(router_ED), y_MD.shape[1]
    out_ND = y_MD.new_empty(tokens, width)
    combine_kernel[(tokens,)](
        y_MD, row_NC, slope_NE, router_ED, out_ND, width, experts,
        CHOICES=choices, ROUTED=router_ED is not None,
        BLOCK=triton.next_power_of_2(width),
    )  # fmt: skip
    return out_ND


class Experts(torch.autograd.Function):
    """x (N, D) bf16, router (E, D) float32, gate and up projections side by side (E, 2F, D), down
    (E, D, F) -> y (N, D), the balance loss, the z-loss, and without gradients the experts chosen
    (N, C), the load (E,) and the router's logits (N, E)."""

    @staticmethod
    def forward(
        ctx, x_ND: Tensor, router_ED: Tensor, packed: Tensor, down: Tensor, choices: int
    ) -> tuple[Tensor, ...]:
        to = route(x_ND, router_ED, choices)
        x_MD = gather(x_ND, to.token_M)
        # Weighed here and not after `down`: the weights' gradient then needs no product again.
        gate_up_MF, h_MF = gate_up(x_MD, packed, to.weight_M, to.ends_E)
        y_MD = grouped(h_MF, down, to.ends_E, turned=True)
        ctx.save_for_backward(
            x_ND, router_ED, packed, down, x_MD, gate_up_MF, h_MF,
            to.logits_NE, to.chosen_NC, to.weight_NC, to.row_NC, to.token_M, to.weight_M,
            to.ends_E, to.load_E,
        )  # fmt: skip
        told = to.chosen_NC, to.load_E, to.logits_NE
        ctx.mark_non_differentiable(*told)
        return combine(y_MD, to.row_NC), to.balance, to.z, *told

    @staticmethod
    def backward(ctx, grad_ND: Tensor, grad_balance: Tensor, grad_z: Tensor, *_):
        (
            x_ND, router_ED, packed, down, x_MD, gate_up_MF, h_MF,
            logits_NE, chosen_NC, weight_NC, row_NC, token_M, weight_M, ends_E, load_E,
        ) = ctx.saved_tensors  # fmt: skip
        grad_MD = gather(grad_ND.contiguous(), token_M)
        grad_down = grouped_weights(grad_MD, h_MF, ends_E)
        grad_h_MF = grouped(grad_MD, down, ends_E)
        grad_MF, grad_weight_M = swiglu_backward(grad_h_MF, gate_up_MF, weight_M)
        grad_packed = grouped_weights(grad_MF, x_MD, ends_E)
        grad_x_MD = grouped(grad_MF, packed, ends_E)

        slope_NE = torch.empty_like(logits_NE)
        tokens, experts = logits_NE.shape
        route_backward_kernel[(triton.cdiv(tokens, ROWS),)](
            logits_NE, row_NC, chosen_NC, weight_NC, grad_weight_M, load_E,
            grad_balance, grad_z, slope_NE, tokens, experts,
            CHOICES=chosen_NC.shape[1], ROWS=ROWS, EXPERTS=triton.next_power_of_2(experts),
        )  # fmt: skip
        grad_router = (slope_NE.T.to(x_ND.dtype) @ x_ND).to(router_ED.dtype)
        grad_x_ND = combine(grad_x_MD, row_NC, slope_NE, router_ED)
        return grad_x_ND, grad_router, grad_packed, grad_down, None
