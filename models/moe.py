"""A mixture of experts that drops no token: every choice is computed, sorted by expert.

Shapes are as in model.py, and: N tokens, C choices per token, M = N * C rows sorted by expert.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig
from models.precision import autocast_to

ROW_MULTIPLE = 32
"""Each expert's number of rows is made a multiple of this where that is faster."""


class Routing(NamedTuple):
    """What one layer's router did with a batch."""

    expert_ids_NC: Tensor
    """Chosen experts of each token, the one with the largest weight first, int64."""
    load_E: Tensor
    """Share of all choices that went to each expert; sums to 1."""
    load_balance_loss: Tensor
    """Switch Transformer's loss (arXiv:2101.03961, eq. 4), summed over choices: E * sum of (share
    of tokens x mean probability), which is top_k where both are uniform."""
    z_loss: Tensor
    """Mean squared log of the softmax denominator (ST-MoE, arXiv:2202.08906, eq. 5)."""
    logits_NE: Tensor
    """The router's logits, without gradients."""


class Router(nn.Module):
    """Picks `top_k` experts per token and weighs them by a softmax over those alone, as Mixtral
    does (arXiv:2401.04088)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.top_k = config.top_k
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.d_model))

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Routing]:
        """Returns the weights (N, C) of each token's chosen experts, which sum to 1, and the
        choice."""
        # In the weights' own precision: rounding the logits to bf16 would flip close choices.
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.to(self.weight.dtype), self.weight)
            top_NC, expert_ids_NC = logits_NE.topk(self.top_k)
            weight_NC = top_NC.softmax(-1)
            count_E = count_choices(expert_ids_NC, len(self.weight)).to(logits_NE.dtype)
            share_E = count_E / len(x_ND)
            load_balance_loss = len(self.weight) * (share_E * logits_NE.softmax(-1).mean(0)).sum()
            return weight_NC, Routing(
                expert_ids_NC=expert_ids_NC,
                load_E=share_E / self.top_k,
                load_balance_loss=load_balance_loss,
                z_loss=logits_NE.logsumexp(-1).square().mean(),
                logits_NE=logits_NE.detach(),
            )


def count_choices(expert_ids_NC: Tensor, num_experts: int) -> Tensor:
    """Returns how often each expert was chosen, (E,) int64. (`bincount` would make the host wait
    for the GPU.)"""
    flat = expert_ids_NC.flatten()
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
        """Returns (B, T, D), and what the router did."""
        x_ND = x_BTD.flatten(0, 1)
        weight_NC, routing = self.router(x_ND)
        order_M = routing.expert_ids_NC.flatten().argsort(stable=True)
        count_E = count_choices(routing.expert_ids_NC, len(self.gate_proj))
        place_M = order_M.argsort()

        x_MD = autocast_to(x_ND).index_select(0, order_M // weight_NC.shape[1])
        if is_faster_padded(x_MD, len(count_E)):
            x_MD, count_E, slot_M = pad_experts(x_MD, count_E)
            place_M = slot_M.index_select(0, place_M)
        ends_E = count_E.cumsum(0, dtype=torch.int32)
        h_MF = F.silu(grouped_linear(x_MD, self.gate_proj, ends_E))
        h_MF = h_MF * grouped_linear(x_MD, self.up_proj, ends_E)
        y_MD = grouped_linear(h_MF, self.down_proj, ends_E)

        y_NCD = y_MD.index_select(0, place_M).unflatten(0, weight_NC.shape)
        y_ND = (y_NCD * weight_NC.to(y_NCD.dtype)[..., None]).sum(1)
        return y_ND.view(x_BTD.shape), routing


def is_faster_padded(x_MD: Tensor, num_experts: int) -> bool:
    """Whether each expert is to have a multiple of ROW_MULTIPLE rows. In bf16 on the CPU, oneDNN
    makes a kernel for each number of rows that it has not seen, which takes longer than to use it;
    experts have other numbers in each step."""
    is_onednn = x_MD.device.type == "cpu" and x_MD.dtype == torch.bfloat16
    return is_onednn and len(x_MD) >= ROW_MULTIPLE * num_experts


def pad_experts(x_MD: Tensor, count_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns rows sorted by expert with rows of zeros behind those of each, so many that they are
    a multiple of ROW_MULTIPLE; the new number of rows of each expert; and where each row lies
    now."""
    padded_E = (count_E + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    added_E = (padded_E - count_E).cumsum(0) - (padded_E - count_E)  # in front of each expert
    slot_M = torch.arange(len(x_MD)) + added_E.repeat_interleave(count_E)
    x_PD = x_MD.new_zeros(int(padded_E.sum()), x_MD.shape[1]).index_copy(0, slot_M, x_MD)
    return x_PD, padded_E, slot_M


def grouped_linear(x_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Returns (M, O): the rows of `x` from ends_E[e - 1] up to ends_E[e] times expert e's
    weight."""
    x_MI, weight_EOI = autocast_to(x_MI), autocast_to(weight_EOI)  # autocast skips grouped_mm
    if has_grouped_mm(weight_EOI):
        return F.grouped_mm(x_MI, weight_EOI.transpose(-2, -1), offs=ends_E)
    ends = ends_E.tolist()
    rows = zip(weight_EOI, [0, *ends[:-1]], ends, strict=True)
    return torch.cat([F.linear(x_MI[start:end], weight) for weight, start, end in rows])


def has_grouped_mm(weight_EOI: Tensor) -> bool:
    """Whether torch's grouped_mm takes this weight: on CUDA or the CPU, no float64, and rows and
    columns of whole 16 bytes."""
    is_aligned = all(size * weight_EOI.element_size() % 16 == 0 for size in weight_EOI.shape[1:])
    is_supported = weight_EOI.device.type in ("cuda", "cpu") and weight_EOI.dtype != torch.float64
    return is_aligned and is_supported
