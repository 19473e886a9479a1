"""The validation loss, and how a model uses its experts on the validation text."""

from typing import TYPE_CHECKING

import torch

from models import SLM, next_token_loss
from transfer.probe import exact_matmul
from utils.metrics.diagnostics import ROUTING_STATS, routing_stats, underused_experts
from utils.runtime.device import autocast

if TYPE_CHECKING:
    from utils.training.context import RunContext

EVAL_SEQUENCES, LOW_MEMORY_EVAL_SEQUENCES = 8, 2
"""Sequences evaluated at a time: a low-memory run must not need more for that than for a step of
one sequence."""


@torch.no_grad()
def evaluate(model: SLM, context: "RunContext", dtype: torch.dtype) -> tuple[float, dict]:
    """Evaluates a model on the validation windows, with products in `dtype`.

    Returns:
        The loss in nats per token, and for a mixture by name: `expert_load`, the share of choices
        that each layer's experts got, `underused_experts`, the share of experts that are underused,
        and ROUTING_STATS.
    """
    device, valid = context.device, context.valid
    loss = torch.zeros((), device=device)
    loads, stats = [], []
    low_memory = context.run.training.low_memory
    for rows in valid.split(LOW_MEMORY_EVAL_SEQUENCES if low_memory else EVAL_SEQUENCES):
        share = len(rows) / len(valid)
        with autocast(device, dtype):
            out = model(rows[:, :-1])
            loss += share * next_token_loss(out, rows)
        if out.routing:
            loads.append(share * torch.stack([layer.load_E for layer in out.routing]))
            stats.append(share * routing_stats(out.routing))
    if not loads:
        return loss.item(), {}
    load = torch.stack(loads).sum(0).tolist()
    experts = sum(map(len, load))
    usage = {"expert_load": load, "underused_experts": len(underused_experts(load)) / experts}
    means = torch.stack(stats).sum(0).tolist()
    return loss.item(), usage | dict(zip(ROUTING_STATS, means, strict=True))


def evaluate_fp32(model: SLM, context: "RunContext") -> float:
    """Returns the validation loss in float32, in nats per token: a growth makes no jump in it."""
    with exact_matmul():
        return evaluate(model, context, torch.float32)[0]
