"""Growing, then training, is training, then growing: the two ways must lead to the same model.

They do, with the default settings, where the symmetry of the copies is kept (no noise), each
parameter learns at its own rate and counts in the norm as it should (transfer/lr_scaling.py), the
learning rate is the same, and nothing new is trained: a new block is frozen here, and its gradient
left out of the norm. A mutation, any rule of growth broken, leaves a gap.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor

from config import Deepen, Growth, ModelConfig, TrainingConfig
from models import SLM, next_token_loss
from transfer import AdamWScale, AdamWScales, TrainState, adamw_scales, apply_plan, make_plan
from transfer.plan import NewParam, Plan, Tile
from utils.optim.adamw import TorchAdamW

SETTINGS = TrainingConfig()
"""The defaults, decay and clipping included."""
STEPS_BEFORE, STEPS_AFTER = 5, 25
"""Steps of Adam before the growth, and after it or in its stead."""
BATCH_SIZE = 1
"""Sequences in a batch: so few that gradients are clipped in every step."""
LR = 3e-3
MAX_GAP = 1e-12
"""Largest |logit difference| that float64 may leave."""

Mutation = Callable[[TrainState, TrainState, Plan, AdamWScales], tuple[TrainState, AdamWScales]]
"""From the old state, the grown one, the plan and the scales: what is trained in their place."""


def train_on(
    state: TrainState, scales: AdamWScales, training: TrainingConfig, batches: list[Tensor]
) -> tuple[TrainState, list[float]]:
    """Returns `state`, which stays as it was, after a step on each batch (B, T + 1), and the norm
    of the gradient in each step."""
    optimizer = TorchAdamW(deepcopy(state), training, scales)
    optimizer.set_lr(LR)
    norms = []
    for tokens_BS in batches:
        out = optimizer.model(tokens_BS[:, :-1])
        loss = next_token_loss(out, tokens_BS)
        loss = loss + training.load_balance_coef * out.load_balance_loss
        loss = loss + training.z_loss_coef * out.z_loss
        loss.backward()
        norms.append(optimizer.step().item())
    return optimizer.into_train_state(), norms


class CommutationTest:
    """One growth of a small random model, in float64, that Adam has trained for STEPS_BEFORE."""

    def __init__(self, config: ModelConfig, growth: Growth, training: TrainingConfig = SETTINGS):
        if isinstance(growth, Deepen):  # a new router adds to the means of the routers' losses
            training = replace(training, load_balance_coef=0.0, z_loss_coef=0.0)
        self.growth, self.training = growth, training
        torch.manual_seed(0)
        shape = BATCH_SIZE, config.seq_len + 1
        batches = [
            torch.randint(config.vocab_size, shape) for _ in range(STEPS_BEFORE + STEPS_AFTER)
        ]
        self.later_batches = batches[STEPS_BEFORE:]
        initial = TrainState.from_model(SLM(config).double())
        unscaled = adamw_scales(initial.weights, ())
        self.old, _ = train_on(initial, unscaled, training, batches[:STEPS_BEFORE])
        self.config, self.plan = make_plan(config, growth)
        trained, self.grad_norms = train_on(self.old, unscaled, training, self.later_batches)
        self.target = self.evaluate(apply_plan(self.config, self.plan, trained))

    def evaluate(self, state: TrainState) -> tuple[Tensor, Tensor]:
        """Returns logits (B, T, V) and loss on the first of the later batches."""
        tokens_BS = self.later_batches[0]
        with torch.no_grad():
            out = state.model()(tokens_BS[:, :-1])
            return out.logits, next_token_loss(out, tokens_BS)

    def gap(self, mutation: Mutation | None = None) -> tuple[float, float]:
        """Returns how far the two ways are apart: the largest |logit difference|, and the
        difference of the loss in nats."""
        start = apply_plan(self.config, self.plan, self.old)
        scales = adamw_scales(start.weights, [self.growth])
        new_params = [name for name, row in self.plan.items() if isinstance(row, NewParam)]
        scales |= dict.fromkeys(new_params, AdamWScale(lr=0.0, norm_weight=0.0))
        if mutation is not None:
            start, scales = mutation(self.old, start, self.plan, scales)
        trained, _ = train_on(start, scales, self.training, self.later_batches)
        result = self.evaluate(trained)
        logits, loss = (
            (ours - target).abs().max().item()
            for ours, target in zip(result, self.target, strict=True)
        )
        return logits, loss


def reset_moments(
    old: TrainState, new: TrainState, plan: Plan, scales: AdamWScales
) -> tuple[TrainState, AdamWScales]:
    """Drops Adam's state."""
    return TrainState(new.config, new.weights), scales


def leave_moments_unscaled(
    old: TrainState, new: TrainState, plan: Plan, scales: AdamWScales
) -> tuple[TrainState, AdamWScales]:
    """Tiles moments as the weights' outputs are tiled, without the gradient's share."""
    for name, row in plan.items():
        if isinstance(row, Tile):
            for kind in ("exp_avg", "exp_avg_sq"):
                new.adam[name][kind] = old.adam[row.source][kind].tile(row.repeats)
    return new, scales


def leave_share_unsquared(
    old: TrainState, new: TrainState, plan: Plan, scales: AdamWScales
) -> tuple[TrainState, AdamWScales]:
    """Scales the second moment by the gradient's share in place of its square."""
    for name, row in plan.items():
        if isinstance(row, Tile):
            new.adam[name]["exp_avg_sq"] /= row.grad_share
    return new, scales


def set_scale(**factor: float) -> Mutation:
    """Returns a mutation that sets one factor of every parameter's scale."""

    def mutation(
        old: TrainState, new: TrainState, plan: Plan, scales: AdamWScales
    ) -> tuple[TrainState, AdamWScales]:
        return new, {name: scale._replace(**factor) for name, scale in scales.items()}

    return mutation


WIDENING: dict[str, Mutation] = {
    "moments reset": reset_moments,
    "moments unscaled": leave_moments_unscaled,
    "second moment not squared": leave_share_unsquared,
    "same lr": set_scale(lr=1.0),
    "same eps": set_scale(eps=1.0),
    "same decay": set_scale(weight_decay=1.0),
    "same norm": set_scale(norm_weight=1.0),
}
DEEPENING: dict[str, Mutation] = {
    "moments reset": reset_moments,
    "new blocks trained": set_scale(lr=1.0),
    "new blocks in the norm": set_scale(norm_weight=1.0),
}


def mutations(growth: Growth) -> dict[str, Mutation]:
    """Returns what would open a gap for this growth, by name."""
    return DEEPENING if isinstance(growth, Deepen) else WIDENING
