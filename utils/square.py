"""Growing, then training, is training, then growing: the square of four models that must commute.

It does where the symmetry of the copies is kept (no noise) and each parameter learns at its own
rate (transfer/rates.py). A breach of any rule of growth leaves a gap.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor

from config import Deepen, Growth, ModelConfig, TrainingConfig
from models import SLM, next_token_loss
from transfer import Rate, Rates, State, carry_out, plan_for, rates
from transfer.plan import Fresh, Plan, Tile
from utils.optimizer import Plain

SETTINGS = TrainingConfig(weight_decay=0.0, grad_clip=1e9)
"""The norm of the gradient changes in growing: clipping would not commute."""
BEFORE, STEPS = 5, 25
"""Of Adam before the growth, and after it or in its stead."""
LR = 3e-3
ALLOWED = 1e-12
"""Largest |logit difference| that float64 may leave."""

Breach = Callable[[State, State, Plan, Rates], tuple[State, Rates]]
"""From the old State, the grown one, the plan and the rates: what is trained in their place."""


def trained(state: State, paces: Rates, settings: TrainingConfig, batches: list[Tensor]) -> State:
    """`state`, which is left as it was, after a step on each batch (B, T + 1)."""
    optimizer = Plain(deepcopy(state), settings, paces)
    optimizer.set_lr(LR)
    for tokens_BS in batches:
        out = optimizer.model(tokens_BS[:, :-1])
        loss = next_token_loss(out, tokens_BS)
        loss = loss + settings.balance_coef * out.balance_loss + settings.z_coef * out.z_loss
        loss.backward()
        optimizer.step()
    return optimizer.rest()


class Square:
    """One growth of a small random model, in float64; Adam has trained it for BEFORE already."""

    def __init__(self, config: ModelConfig, how: Growth, settings: TrainingConfig = SETTINGS):
        if isinstance(how, Deepen):  # a new router adds to the mean of the balance losses
            settings = replace(settings, balance_coef=0.0, z_coef=0.0)
        self.how, self.settings = how, settings
        torch.manual_seed(0)
        shape = 4, config.seq_len + 1
        batches = [torch.randint(config.vocab_size, shape) for _ in range(BEFORE + STEPS)]
        self.later = batches[BEFORE:]
        fresh = State.of(SLM(config).double())
        alone = rates(fresh.weights, ())
        self.old = trained(fresh, alone, settings, batches[:BEFORE])
        self.config, self.plan = plan_for(config, how)
        last = trained(self.old, alone, settings, self.later)
        self.goal = self.judged(carry_out(self.config, self.plan, last))

    def judged(self, state: State) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) and loss on the first batch of the later ones."""
        tokens_BS = self.later[0]
        with torch.no_grad():
            out = state.model()(tokens_BS[:, :-1])
            return out.logits, next_token_loss(out, tokens_BS)

    def gap(self, breach: Breach | None = None) -> tuple[float, float]:
        """Between the two ways: the largest |logit difference|, and that of the loss in nats."""
        start = carry_out(self.config, self.plan, self.old)
        paces = rates(start.weights, [self.how])
        new_ones = [name for name, row in self.plan.items() if isinstance(row, Fresh)]
        paces |= dict.fromkeys(new_ones, Rate(lr=0.0, decay=0.0))
        if breach is not None:
            start, paces = breach(self.old, start, self.plan, paces)
        found = self.judged(trained(start, paces, self.settings, self.later))
        logits, loss = (
            (one - other).abs().max().item() for one, other in zip(found, self.goal, strict=True)
        )
        return logits, loss


def forgotten(old: State, new: State, plan: Plan, paces: Rates) -> tuple[State, Rates]:
    return State(new.config, new.weights), paces


def unscaled(old: State, new: State, plan: Plan, paces: Rates) -> tuple[State, Rates]:
    """Moments tiled as the weights' outputs are, without their share."""
    for name, row in plan.items():
        if isinstance(row, Tile):
            for kind in ("exp_avg", "exp_avg_sq"):
                new.adam[name][kind] = old.adam[row.source][kind].tile(row.copies)
    return new, paces


def unsquared(old: State, new: State, plan: Plan, paces: Rates) -> tuple[State, Rates]:
    """The second moment takes the share, not its square."""
    for name, row in plan.items():
        if isinstance(row, Tile):
            new.adam[name]["exp_avg_sq"] /= row.share
    return new, paces


def same(**factor: float) -> Breach:
    """This factor of every rate is 1."""

    def breach(old: State, new: State, plan: Plan, paces: Rates) -> tuple[State, Rates]:
        return new, {name: rate._replace(**factor) for name, rate in paces.items()}

    return breach


WIDENING: dict[str, Breach] = {
    "moments reset": forgotten,
    "moments unscaled": unscaled,
    "second moment not squared": unsquared,
    "same lr": same(lr=1.0),
    "same eps": same(eps=1.0),
}
DEEPENING: dict[str, Breach] = {
    "moments reset": forgotten,
    "new blocks trained": same(lr=1.0),
}


def breaches(how: Growth) -> dict[str, Breach]:
    """What would break the square of this growth, by name."""
    return DEEPENING if isinstance(how, Deepen) else WIDENING
