"""A mixture-of-experts layer with its routing, sorting and activation fused around the grouped
products. The plain definition is models.moe.MoE.

`route_kernel` chooses each token's experts and counts them per block of ROUTE_ROWS tokens;
`sort_kernel` then gives each choice its row in the order of the experts.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.fused.grouped_gemm import gate_up, grouped_gemm, grouped_weight_grads
from models.fused.swiglu import swiglu_backward
from models.moe import Routing
from models.precision import PackedProjections, autocast_to, packed_weight

ROUTE_ROWS = 64
"""Tokens that one program routes."""


@triton.jit
def route_kernel(
    x_ptr, router_ptr, logits_ptr, expert_ids_ptr, weight_ptr, count_ptr, prob_ptr, z_ptr,
    tokens, width, experts,
    CHOICES: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Chooses the experts of a block of tokens, and sums what the losses of the router need."""
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
        # A weight as the sum of two bf16 keeps 16 of its bits; the sum over columns loses more.
        rough = router.to(x.dtype)
        logits = tl.dot(x, rough, logits)
        logits = tl.dot(x, (router - rough.to(tl.float32)).to(x.dtype), logits)
    at = rows[:, None] * experts + expert[None, :]
    in_table = here[:, None] & (expert < experts)[None, :]
    tl.store(logits_ptr + at, logits, in_table)

    logits = tl.where((expert < experts)[None, :], logits, float("-inf"))
    top = tl.max(logits, 1)
    exp_logits = tl.exp(logits - top[:, None])
    total = tl.sum(exp_logits, 1)
    prob = tl.where(here[:, None], exp_logits / total[:, None], 0.0)
    tl.store(prob_ptr + block * EXPERTS + expert, tl.sum(prob, 0))
    log_sum = tl.where(here, top + tl.log(total), 0.0)
    tl.store(z_ptr + block, tl.sum(log_sum * log_sum))

    remaining = logits
    for _ in tl.static_range(CHOICES):
        best = tl.argmax(remaining, 1)
        remaining = tl.where(expert[None, :] == best[:, None], float("-inf"), remaining)
    is_selected = (remaining != logits) & here[:, None]
    selected_total = tl.sum(tl.where(is_selected, exp_logits, 0.0), 1)
    count = tl.sum(is_selected.to(tl.int32), 0)
    remaining = logits
    for choice in tl.static_range(CHOICES):
        best = tl.argmax(remaining, 1)
        weight = tl.exp(tl.max(remaining, 1) - top) / selected_total
        tl.store(expert_ids_ptr + rows * CHOICES + choice, best.to(tl.int64), here)
        tl.store(weight_ptr + rows * CHOICES + choice, weight, here)
        remaining = tl.where(expert[None, :] == best[:, None], float("-inf"), remaining)
    tl.store(count_ptr + block * EXPERTS + expert, count)


@triton.jit
def sort_kernel(
    expert_ids_ptr, weight_ptr, count_ptr, prob_ptr, z_ptr,
    row_ptr, token_ptr, sorted_ptr, ends_ptr, load_ptr, load_balance_loss_ptr, z_mean_ptr,
    tokens, experts, blocks,
    CHOICES: tl.constexpr, ROWS: tl.constexpr, EACH: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Gives each choice of a block of tokens its row in the order of the experts."""
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
    expert_id = tl.load(expert_ids_ptr + choice, here, other=0).to(tl.int32)
    is_selected = (expert_id[:, None] == expert[None, :]) & here[:, None]
    nth = tl.cumsum(is_selected.to(tl.int32), 0) - 1
    row = tl.sum(tl.where(is_selected, nth + first[None, :], 0), 1)
    tl.store(row_ptr + choice, row, here)
    tl.store(token_ptr + row, choice // CHOICES, here)
    tl.store(sorted_ptr + row, tl.load(weight_ptr + choice, here, other=0.0), here)

    if block == 0:
        prob = tl.zeros([EXPERTS], tl.float32)
        z = 0.0
        for start in range(0, blocks, BLOCKS):
            other = start + tl.arange(0, BLOCKS)
            prob += tl.sum(tl.load(
                prob_ptr + other[:, None] * EXPERTS + expert[None, :],
                (other < blocks)[:, None], other=0.0,
            ), 0)  # fmt: skip
            z += tl.sum(tl.load(z_ptr + other, other < blocks, other=0.0))
        share = total.to(tl.float32) / tokens
        tl.store(ends_ptr + expert, ends, expert < experts)
        tl.store(load_ptr + expert, share / CHOICES, expert < experts)
        tl.store(load_balance_loss_ptr, experts * tl.sum(share * prob) / tokens)
        tl.store(z_mean_ptr, z / tokens)


@triton.jit
def route_backward_kernel(
    logits_ptr, row_ptr, expert_ids_ptr, weight_ptr, grad_sorted_ptr, load_ptr,
    grad_load_balance_ptr, grad_z_ptr, grad_logits_ptr, tokens, experts,
    CHOICES: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of the router's logits for a block of tokens."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS)
    here = rows < tokens
    at = rows[:, None] * experts + expert[None, :]
    in_table = here[:, None] & (expert < experts)[None, :]
    logits = tl.load(logits_ptr + at, in_table, other=float("-inf"))
    top = tl.where(here, tl.max(logits, 1), 0.0)
    exp_logits = tl.exp(logits - top[:, None])
    total = tl.where(here, tl.sum(exp_logits, 1), 1.0)
    prob = exp_logits / total[:, None]
    log_sum = top + tl.log(total)

    share = tl.load(load_ptr + expert, expert < experts, other=0.0) * CHOICES
    balance = tl.load(grad_load_balance_ptr) * experts / tokens
    grad = balance * prob * (share[None, :] - tl.sum(prob * share[None, :], 1)[:, None])
    grad += (tl.load(grad_z_ptr) * 2.0 / tokens) * log_sum[:, None] * prob

    mean_grad = tl.zeros([ROWS], tl.float32)
    for choice in tl.static_range(CHOICES):
        at_choice = rows * CHOICES + choice
        weight = tl.load(weight_ptr + at_choice, here, other=0.0)
        mean_grad += weight * tl.load(
            grad_sorted_ptr + tl.load(row_ptr + at_choice, here, other=0), here
        )
    for choice in tl.static_range(CHOICES):
        at_choice = rows * CHOICES + choice
        weight = tl.load(weight_ptr + at_choice, here, other=0.0)
        grad_weight = tl.load(grad_sorted_ptr + tl.load(row_ptr + at_choice, here, other=0), here)
        is_selected = tl.load(expert_ids_ptr + at_choice, here, other=0)[:, None] == expert[None, :]
        grad += tl.where(is_selected, (weight * (grad_weight - mean_grad))[:, None], 0.0)
    tl.store(grad_logits_ptr + at, grad, in_table)


@triton.jit
def gather_kernel(x_ptr, token_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """Copies one row."""
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
    """Sums each token's rows and, in the backward pass, its gradient through the router."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    out = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(CHOICES):
        row = tl.load(row_ptr + token * CHOICES + choice).to(tl.int64)
        out += tl.load(y_ptr + row * width + cols, mask, other=0.0).to(tl.float32)
    if ROUTED:
        for expert in range(0, experts):
            grad_weight = tl.load(grad_logits_ptr + token * experts + expert)
            out += grad_weight * tl.load(router_ptr + expert * width + cols, mask, other=0.0)
    tl.store(out_ptr + token * width + cols, out.to(out_ptr.dtype.element_ty), mask)


class SortedRouting(NamedTuple):
    """What the router did with a batch, and where the rows of its choices lie."""

    logits_NE: Tensor
    expert_ids_NC: Tensor
    weight_NC: Tensor
    row_NC: Tensor
    """Row of each choice among the rows sorted by expert, int32."""
    token_M: Tensor
    """Token of each sorted row, int32."""
    weight_M: Tensor
    """Weight of each sorted row."""
    ends_E: Tensor
    """Where each expert's rows end."""
    load_E: Tensor
    load_balance_loss: Tensor
    z_loss: Tensor


def route(x_ND: Tensor, router_ED: Tensor, choices: int) -> SortedRouting:
    """Chooses experts for each token and sorts the choices by expert. The plain definition is
    models.moe.Router."""
    tokens, (experts, width) = len(x_ND), router_ED.shape
    blocks, padded = triton.cdiv(tokens, ROUTE_ROWS), max(16, triton.next_power_of_2(experts))
    empty = router_ED.new_empty  # float32 unless a dtype is given
    routing = SortedRouting(
        logits_NE=empty(tokens, experts),
        expert_ids_NC=empty(tokens, choices, dtype=torch.int64),
        weight_NC=empty(tokens, choices),
        row_NC=empty(tokens, choices, dtype=torch.int32),
        token_M=empty(tokens * choices, dtype=torch.int32),
        weight_M=empty(tokens * choices),
        ends_E=empty(experts, dtype=torch.int32),
        load_E=empty(experts),
        load_balance_loss=empty(()),
        z_loss=empty(()),
    )
    count, prob = empty(blocks, padded, dtype=torch.int32), empty(blocks, padded)
    z = empty(blocks)
    route_kernel[(blocks,)](
        x_ND, router_ED, routing.logits_NE, routing.expert_ids_NC, routing.weight_NC,
        count, prob, z, tokens, width, experts,
        CHOICES=choices, ROWS=ROUTE_ROWS, EXPERTS=padded, BLOCK=128,
    )  # fmt: skip
    sort_kernel[(blocks,)](
        routing.expert_ids_NC, routing.weight_NC, count, prob, z,
        routing.row_NC, routing.token_M, routing.weight_M,
        routing.ends_E, routing.load_E, routing.load_balance_loss, routing.z_loss,
        tokens, experts, blocks, CHOICES=choices, ROWS=ROUTE_ROWS,
        EACH=triton.next_power_of_2(ROUTE_ROWS * choices), EXPERTS=padded, BLOCKS=128,
    )  # fmt: skip
    return routing


def gather_rows(x_ND: Tensor, token_M: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the rows (M, D) of x (N, D) at `token_M`, in x's own dtype if none is given."""
    out_MD = x_ND.new_empty(len(token_M), x_ND.shape[1], dtype=dtype)
    gather_kernel[(len(token_M),)](
        x_ND, token_M, out_MD, x_ND.shape[1], BLOCK=triton.next_power_of_2(x_ND.shape[1])
    )
    return out_MD


def combine(
    y_MD: Tensor,
    row_NC: Tensor,
    grad_logits_NE: Tensor | None = None,
    router_ED: Tensor | None = None,
) -> Tensor:
    """Returns (N, D): the sum over each token's choices of their rows of y (M, D), plus the
    gradient through the router where its logits' gradients are given."""
    tokens, choices = row_NC.shape
    experts, width = 0 if router_ED is None else len(router_ED), y_MD.shape[1]
    out_ND = y_MD.new_empty(tokens, width)
    combine_kernel[(tokens,)](
        y_MD, row_NC, grad_logits_NE, router_ED, out_ND, width, experts,
        CHOICES=choices, ROUTED=router_ED is not None,
        BLOCK=triton.next_power_of_2(width),
    )  # fmt: skip
    return out_ND


class Experts(torch.autograd.Function):
    """x (N, D) bf16, router (E, D) float32, gate and up projections side by side (E, 2F, D), down
    (E, D, F) -> y (N, D), the load-balancing loss, the z-loss, and without gradients the chosen
    experts (N, C), the load (E,) and the router's logits (N, E)."""

    @staticmethod
    def forward(
        ctx, x_ND: Tensor, router_ED: Tensor, packed: Tensor, down: Tensor, choices: int
    ) -> tuple[Tensor, ...]:
        routing = route(x_ND, router_ED, choices)
        x_MD = gather_rows(x_ND, routing.token_M)
        # Weighted here and not after `down`: the weights' gradient then needs no second product.
        gate_up_MF, h_MF = gate_up(x_MD, packed, routing.weight_M, routing.ends_E)
        y_MD = grouped_gemm(h_MF, down, routing.ends_E, transposed=True)
        ctx.save_for_backward(
            x_ND, router_ED, packed, down, x_MD, gate_up_MF, h_MF,
            routing.logits_NE, routing.expert_ids_NC, routing.weight_NC, routing.row_NC,
            routing.token_M, routing.weight_M, routing.ends_E, routing.load_E,
        )  # fmt: skip
        observed = routing.expert_ids_NC, routing.load_E, routing.logits_NE
        ctx.mark_non_differentiable(*observed)
        y_ND = combine(y_MD, routing.row_NC)
        return y_ND, routing.load_balance_loss, routing.z_loss, *observed

    @staticmethod
    def backward(ctx, grad_ND: Tensor, grad_load_balance: Tensor, grad_z: Tensor, *_):
        (
            x_ND, router_ED, packed, down, x_MD, gate_up_MF, h_MF,
            logits_NE, expert_ids_NC, weight_NC, row_NC, token_M, weight_M, ends_E, load_E,
        ) = ctx.saved_tensors  # fmt: skip
        grad_MD = gather_rows(grad_ND.contiguous(), token_M)
        grad_down = grouped_weight_grads(grad_MD, h_MF, ends_E)
        grad_h_MF = grouped_gemm(grad_MD, down, ends_E)
        grad_MF, grad_weight_M = swiglu_backward(grad_h_MF, gate_up_MF, weight_M)
        grad_packed = grouped_weight_grads(grad_MF, x_MD, ends_E)
        grad_x_MD = grouped_gemm(grad_MF, packed, ends_E)

        grad_logits_NE = torch.empty_like(logits_NE)
        tokens, experts = logits_NE.shape
        route_backward_kernel[(triton.cdiv(tokens, ROUTE_ROWS),)](
            logits_NE, row_NC, expert_ids_NC, weight_NC, grad_weight_M, load_E,
            grad_load_balance, grad_z, grad_logits_NE, tokens, experts,
            CHOICES=expert_ids_NC.shape[1], ROWS=ROUTE_ROWS,
            EXPERTS=triton.next_power_of_2(experts),
        )  # fmt: skip
        grad_router = (grad_logits_NE.T.to(x_ND.dtype) @ x_ND).to(router_ED.dtype)
        grad_x_ND = combine(grad_x_MD, row_NC, grad_logits_NE, router_ED)
        return grad_x_ND, grad_router, grad_packed, grad_down, None


def fused_moe(layer: PackedProjections, x_BTD: Tensor) -> tuple[Tensor, Routing]:
    """Returns the mixture of experts (B, T, D) of `x` (B, T, D), and what the router did."""
    router, x_ND = layer.router, autocast_to(x_BTD.flatten(0, 1))
    y_ND, load_balance_loss, z_loss, expert_ids_NC, load_E, logits_NE = Experts.apply(
        x_ND, router.weight, packed_weight(layer), autocast_to(layer.down_proj), router.top_k
    )
    routing = Routing(expert_ids_NC, load_E, load_balance_loss, z_loss, logits_NE)
    return y_ND.view(x_BTD.shape), routing
