"""Between a State at rest and a model with its optimizer at work."""

import torch

from config import TrainingConfig
from models import SLM
from transfer import State


def wake(state: State, settings: TrainingConfig) -> tuple[SLM, torch.optim.AdamW]:
    """The model around the tensors of `state`, and the optimizer with the memory it had."""
    model = state.model()
    named = dict(model.named_parameters())
    gains = [p for p in named.values() if p.dim() == 1]
    others = [p for p in named.values() if p.dim() > 1]
    optimizer = torch.optim.AdamW(
        [{"params": others}, {"params": gains, "weight_decay": 0.0}],
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    for name, moments in state.adam.items():
        optimizer.state[named[name]] = moments
    return model, optimizer


def rest(model: SLM, optimizer: torch.optim.AdamW) -> State:
    state = State.of(model)
    for name, weight in model.named_parameters():
        if weight in optimizer.state:
            state.adam[name] = optimizer.state[weight]
    return state
