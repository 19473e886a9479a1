"""The validation loss, and how a model uses its experts on the validation text."""

import torch
from torch import Tensor

from models import SLM, next_token_loss
from transfer.probe import exact_matmul
from utils.metrics.diagnostics import ROUTING_STATS, routing_stats, underused_experts
from utils.runtime.device import autocast


@torch.no_grad()
def evaluate(
    model: SLM, valid_BS: Tensor, dtype: torch.dtype, batch_size: int
) -> tuple[float, dict]:
    """Evaluates a model on validation windows (B, T + 1), `batch_size` at a time, with products in
    `dtype`.

    Returns:
        The loss in nats per token, and for a mixture by name: `expert_load`, the share of choices
        that each layer's experts got, `underused_experts`, the share of experts that are underused,
        and ROUTING_STATS.
    """
    loss = torch.zeros((), device=valid_BS.device)
    loads, stats = [], []
    for rows in valid_BS.split(batch_size):
        weight = len(rows) / len(valid_BS)
        with autocast(valid_BS.device, dtype):
            out = model(rows[:, :-1])
            loss += weight * next_token_loss(out, rows)
        if out.routing:
            loads.append(weight * torch.stack([layer.load_E for layer in out.routing]))
            stats.append(weight * routing_stats(out.routing))
    if not loads:
        return loss.item(), {}
    load = torch.stack(loads).sum(0).tolist()
    experts = sum(map(len, load))
    usage = {"expert_load": load, "underused_experts": len(underused_experts(load)) / experts}
    means = torch.stack(stats).sum(0).tolist()
    return loss.item(), usage | dict(zip(ROUTING_STATS, means, strict=True))


def evaluate_fp32(model: SLM, valid_BS: Tensor, batch_size: int) -> float:
    """Returns the validation loss in float32, in nats per token: a growth makes no jump in it."""
    with exact_matmul():
        return evaluate(model, valid_BS, torch.float32, batch_size)[0]
