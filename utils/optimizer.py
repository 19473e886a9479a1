"""Between a State at rest and a model with its optimizer at work."""

from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from config import TrainingConfig, require
from models import SLM, fused
from transfer import State


class Optimizer(Protocol):
    """AdamW with what it trains. A step takes the gradients of the model's parameters, clips and
    drops them, and returns their norm; where that is not finite it changes nothing."""

    model: SLM

    def set_lr(self, lr: float) -> None: ...
    def step(self) -> Tensor: ...
    def rest(self) -> State: ...


def check_lean(settings: TrainingConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raises InputError where the lean optimizer is wanted and cannot work."""
    able = fused.available(device, dtype)
    require(
        not settings.lean or able,
        "training.lean = True needs CUDA, Triton, precision bf16 and training.fused",
    )
    require(
        not settings.lean or find_spec("flashoptim") is not None,
        "training.lean = True needs a library: pip install flashoptim==0.1.4",
    )


def home(state: State, settings: TrainingConfig, device: torch.device) -> State:
    """`state` where it lies between phases; lean, Adam's memory is not on the GPU then."""
    return state.to(device, adam=torch.device("cpu") if settings.lean else device)


def wake(state: State, settings: TrainingConfig, dtype: torch.dtype) -> Optimizer:
    """An optimizer around the tensors of `state`, or in their place, with the memory it had."""
    device = next(iter(state.weights.values())).device
    if settings.lean:
        from utils.lean import Lean

        return Lean(state, settings)
    if fused.available(device, dtype):
        from utils.masters import Masters

        return Masters(state, settings)
    return Plain(state, settings)


class Plain:
    """Torch's own AdamW, on weights that are also what the model computes with."""

    def __init__(self, state: State, settings: TrainingConfig):
        self.model, self.grad_clip = state.model(), settings.grad_clip
        named = dict(self.model.named_parameters())
        gains = [p for p in named.values() if p.dim() == 1]
        others = [p for p in named.values() if p.dim() > 1]
        self.adamw = torch.optim.AdamW(
            [{"params": others}, {"params": gains, "weight_decay": 0.0}],
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        for name, moments in state.adam.items():
            self.adamw.state[named[name]] = moments

    def set_lr(self, lr: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = lr

    def step(self) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        # The fused kernel leaves everything as it is where this is 1, so no host has to look first;
        # that for MPS does not.
        self.adamw.found_inf = norm.isfinite().logical_not().float()  # pyright: ignore
        if norm.device.type != "mps" or norm.isfinite():
            self.adamw.step()
        self.adamw.zero_grad()
        return norm

    def rest(self) -> State:
        state = State.of(self.model)
        for name, weight in self.model.named_parameters():
            if weight in self.adamw.state:
                state.adam[name] = self.adamw.state[weight]
        return state
