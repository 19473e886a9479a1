"""A mixture of experts that drops no token: every choice is computed, sorted by expert.

Shapes as in model.py, and: N tokens, C choices per token, M = N * C rows sorted by expert.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig
from models.fused import fuses
from models.precision import lowered, side_by_side


class Routing(NamedTuple):
    """What one layer's router did with a batch."""

    chosen_NC: Tensor
    """Experts of each token, the heaviest first, int64."""
    load_E: Tensor
    """Share of all choices that went to each expert; sums to 1."""
    balance: Tensor
    """Switch Transformer's balance loss (2101.03961, eq. 4), summed over choices: E * sum of (share
    of tokens x mean probability), top_k where both are uniform."""
    z: Tensor
    """Mean squared log of the softmax denominator (ST-MoE, 2202.08906, eq. 5)."""
    logits_NE: Tensor
    """Without gradients."""


class Router(nn.Module):
    """Picks `top_k` experts per token and weighs them by a softmax over those alone."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.top_k = config.top_k
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.d_model))

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Routing]:
        """The weights (N, C) of each token's chosen experts, which sum to 1, and the choice."""
        # In the weights' own precision: rounding the logits to bf16 would flip close choices.
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.to(self.weight.dtype), self.weight)
            top_NC, chosen_NC = logits_NE.topk(self.top_k)
            weight_NC = top_NC.softmax(-1)
            count_E = count(chosen_NC, len(self.weight)).to(logits_NE.dtype)
            share_E = count_E / len(x_ND)
            return weight_NC, Routing(
                chosen_NC=chosen_NC,
                load_E=share_E / self.top_k,
                balance=len(self.weight) * (share_E * logits_NE.softmax(-1).mean(0)).sum(),
                z=logits_NE.logsumexp(-1).square().mean(),
                logits_NE=logits_NE.detach(),
            )


def count(chosen_NC: Tensor, num_experts: int) -> Tensor:
    """How often each expert was chosen. (`bincount` would make the host wait for the GPU.)"""
    flat = chosen_NC.flatten()
    return flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))


class MoE(nn.Module):
    """SwiGLU experts, stacked along the first dimension of each projection."""

    PACKED: tuple[str, ...] = ("gate_proj", "up_proj")
    packed: nn.Parameter | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        experts, width, inner = config.num_experts, config.d_model, config.d_ff
        self.router = Router(config)
        self.gate_proj = nn.Parameter(torch.empty(experts, inner, width))
        self.up_proj = nn.Parameter(torch.empty(experts, inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))
        self.register_parameter("packed", None)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        """(B, T, D) -> (B, T, D), and what the router did."""
        x_ND = x_BTD.flatten(0, 1)
        if fuses(x_ND) and has_grouped_mm(lowered(self.down_proj)):
            from models.fused.experts import Experts

            gate_up, down = side_by_side(self), lowered(self.down_proj)
            router = self.router
            y_ND, balance, z, chosen_NC, load_E, logits_NE = Experts.apply(
                lowered(x_ND), router.weight, gate_up, down, router.top_k
            )
            return y_ND.view(x_BTD.shape), Routing(chosen_NC, load_E, balance, z, logits_NE)
        weight_NC, routing = self.router(x_ND)
        order_M = routing.chosen_NC.flatten().argsort(stable=True)
        ends_E = count(routing.chosen_NC, len(self.gate_proj)).cumsum(0, dtype=torch.int32)

        x_MD = lowered(x_ND).index_select(0, order_M // weight_NC.shape[1])
        h_MF = F.silu(grouped_linear(x_MD, self.gate_proj, ends_E))
        h_MF = h_MF * grouped_linear(x_MD, self.up_proj, ends_E)
        y_MD = grouped_linear(h_MF, self.down_proj, ends_E)

        y_NCD = y_MD.index_select(0, order_M.argsort()).unflatten(0, weight_NC.shape)
        y_ND = (y_NCD * weight_NC.to(y_NCD.dtype)[..., None]).sum(1)
        return y_ND.view(x_BTD.shape), routing


def grouped_linear(x_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Rows up to ends_E[e] go through expert e's weight."""
    x_MI, weight_EOI = lowered(x_MI), lowered(weight_EOI)  # autocast does not know grouped_mm
    if has_grouped_mm(weight_EOI):
        return F.grouped_mm(x_MI, weight_EOI.transpose(-2, -1), offs=ends_E)
    ends = ends_E.tolist()
    rows = zip(weight_EOI, [0, *ends[:-1]], ends, strict=True)
    return torch.cat([F.linear(x_MI[start:end], weight) for weight, start, end in rows])


def has_grouped_mm(weight_EOI: Tensor) -> bool:
    """Torch's kernel wants CUDA or the CPU, no float64, and rows of whole 16 bytes."""
    aligned = all(size * weight_EOI.element_size() % 16 == 0 for size in weight_EOI.shape[1:])
    there = weight_EOI.device.type in ("cuda", "cpu") and weight_EOI.dtype != torch.float64
    return aligned and there
