"""One training step: micro-batches, losses and the optimizer; and the batches it is fed with."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from config import TrainingConfig
from models import next_token_loss
from utils.data import get_batch
from utils.optim.adamw import Optimizer
from utils.optim.cuda_graph import CapturedStep, is_capturable, wants_cuda_graph
from utils.runtime.device import autocast
from utils.schedule.phases import ResolvedPhase

TrainStep = Callable[[Tensor], Tensor]
"""Trains on windows (B, T + 1) and returns STEP_METRICS, on the device."""


def make_train_step(
    optimizer: Optimizer, training: TrainingConfig, dtype: torch.dtype, steps: int
) -> TrainStep:
    """Returns `train_step` for a phase of so many steps, as a CUDA graph where that pays."""
    step = partial(train_step, optimizer, training, dtype)
    if wants_cuda_graph(training, steps) and is_capturable(optimizer):
        return CapturedStep(step, optimizer)
    return step


def step_kind(step: TrainStep) -> str:
    """Returns which of TIME_KINDS the next call of a step counts as: those that compile kernels and
    capture a CUDA graph belong to the start."""
    return "steps" if not isinstance(step, CapturedStep) or step.is_captured else "start"


def train_step(
    optimizer: Optimizer, training: TrainingConfig, dtype: torch.dtype, tokens_BS: Tensor
) -> Tensor:
    """Takes one optimizer step on windows (B, T + 1). Returns STEP_METRICS, on the device."""
    device, total = tokens_BS.device, torch.zeros(3, device=tokens_BS.device)
    for micro_batch in tokens_BS.split(training.micro_batch_size or len(tokens_BS)):
        share = len(micro_batch) / len(tokens_BS)
        with autocast(device, dtype):
            out = optimizer.model(micro_batch[:, :-1])
            losses = next_token_loss(out, micro_batch), out.load_balance_loss, out.z_loss
        loss, load_balance_loss, z_loss = losses
        objective = loss + training.load_balance_coef * load_balance_loss
        objective = objective + training.z_loss_coef * z_loss
        (share * objective).backward()
        total += share * torch.stack(losses).detach()
    return torch.cat([total, optimizer.step()[None]])


def batches(
    text: np.ndarray, phase: ResolvedPhase, seed: int, device: torch.device, done: int = 0
) -> Iterator[Tensor]:
    """Yields the windows (B, T + 1) of each step of a phase after the first `done`. Their content
    follows from the seed and the step's number in the whole run."""
    for step in range(phase.first_step + done, phase.first_step + phase.steps):
        tokens = get_batch(text, phase.config.seq_len, phase.batch_size, seed, step)
        if device.type == "cuda":
            tokens = tokens.pin_memory()
        yield tokens.to(device, non_blocking=True)
