"""A step of the plain optimizer is torch's own clipping and AdamW."""

from copy import deepcopy

import pytest
import torch
from small import CONFIGS, trained_like, windows

from config import TrainingConfig
from models import next_token_loss
from transfer import State
from utils.optimizer import wake


@pytest.mark.parametrize("clip", [1e-3, 1e6])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_step_is_that_of_torch_clipped_to_the_norm_or_not(config, clip):
    settings = TrainingConfig(grad_clip=clip)
    model, tokens = trained_like(config), windows(config)
    optimizer = wake(State.of(deepcopy(model)), settings, torch.float32)
    optimizer.set_lr(1e-2)
    decays = [
        [p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False)
    ]
    adamw = torch.optim.AdamW(
        [
            {"params": params, "weight_decay": settings.weight_decay * matrix}
            for params, matrix in zip(decays, (True, False), strict=True)
        ],
        lr=1e-2,
        betas=(settings.beta1, settings.beta2),
    )
    for _ in range(3):
        for each in (model, optimizer.model):
            next_token_loss(each(tokens[:, :-1]), tokens).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        adamw.step()
        adamw.zero_grad()
        torch.testing.assert_close(optimizer.step(), norm)
        assert all(p.grad is None for p in optimizer.model.parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(optimizer.weights()[name], weight.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    config = CONFIGS["moe"]
    model, tokens = trained_like(config), windows(config)
    optimizer = wake(State.of(model), TrainingConfig(), torch.float32)
    optimizer.set_lr(1e-2)
    for spoil in (False, True):
        before = deepcopy(optimizer.snapshot())
        next_token_loss(optimizer.model(tokens[:, :-1]), tokens).backward()
        if spoil:
            optimizer.model.norm.weight.grad[0] = bad
        assert optimizer.step().isfinite().item() != spoil
        after = optimizer.snapshot()
        same = [torch.equal(after.weights[name], before.weights[name]) for name in after.weights]
        assert all(same) if spoil else not any(same)
    for name, kept in after.adam.items():
        for what, value in kept.items():
            assert torch.equal(value, before.adam[name][what]), (name, what)
