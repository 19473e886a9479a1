"""The learning rate at each step: a linear warm-up, then half a cosine down, in every phase."""

import math

from config import TrainingConfig
from utils.schedule.phases import ResolvedPhase


def lr_at(step: int, phase: ResolvedPhase, training: TrainingConfig) -> float:
    """Returns the learning rate of a phase's step, counted from 0. Every phase warms up anew, but
    one that grew where growing resets Adam without a warm-up."""
    skips_warmup = phase.growth is not None and training.optimizer_state_on_growth == "reset"
    warmup_steps = 0 if skips_warmup else round(training.warmup_fraction * phase.steps)
    if step < warmup_steps:
        return phase.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, phase.steps - warmup_steps)
    return phase.final_lr + (phase.lr - phase.final_lr) * (1 + math.cos(math.pi * progress)) / 2
