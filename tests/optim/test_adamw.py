"""A step of the plain optimizer is torch's own clipping and AdamW."""

from copy import deepcopy

import pytest
import torch

from config import TrainingConfig, Widen
from models import SLM, next_token_loss
from tests.helpers.small_models import (
    DENSE,
    MOE,
    for_each_config,
    is_identical,
    random_model,
    random_train_state,
    windows,
)
from transfer import TrainState
from utils.optim.adamw import build_optimizer


@pytest.mark.parametrize("clip", [1e-3, 1e6])
@for_each_config
def test_a_step_is_that_of_torch_clipped_to_the_norm_or_not(config, clip):
    training = TrainingConfig(grad_clip=clip)
    model, tokens = random_model(config), windows(config)
    optimizer = build_optimizer(TrainState.from_model(deepcopy(model)), training, torch.float32)
    optimizer.set_lr(1e-2)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() == 1]
    adamw = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": training.weight_decay},
            {"params": gains, "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(training.beta1, training.beta2),
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


def test_the_state_goes_through_an_optimizer_unchanged():
    state = random_train_state(MOE)
    before = deepcopy(state)
    optimizer = build_optimizer(state, TrainingConfig(), torch.float32)
    assert is_identical(optimizer.snapshot(), before)
    assert is_identical(optimizer.into_train_state(), before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    model, tokens = random_model(MOE), windows(MOE)
    optimizer = build_optimizer(TrainState.from_model(model), TrainingConfig(), torch.float32)
    optimizer.set_lr(1e-2)
    for is_spoiled in (False, True):
        before = deepcopy(optimizer.snapshot())
        next_token_loss(optimizer.model(tokens[:, :-1]), tokens).backward()
        if is_spoiled:
            optimizer.model.norm.weight.grad[0] = bad
        assert optimizer.step().isfinite().item() != is_spoiled
        after = optimizer.snapshot()
        is_same = [torch.equal(after.weights[name], before.weights[name]) for name in after.weights]
        assert all(is_same) if is_spoiled else not any(is_same)
    assert is_identical(after, before)


@pytest.mark.parametrize("lr_scaling, factor", [("width", 1 / 6), ("none", 1.0)])
def test_the_scales_of_the_growth_history_reach_each_parameter_where_they_are_wanted(
    lr_scaling, factor
):
    training = TrainingConfig(lr_scaling=lr_scaling, weight_decay=0.5)
    state = TrainState.from_model(SLM(DENSE))
    optimizer = build_optimizer(state, training, torch.float32, [Widen(2), Widen(3)])
    settings = {name: each for each, names in optimizer.groups.items() for name in names}
    matrix = settings["blocks.0.attn.q_proj.weight"]
    assert matrix.lr_scale == pytest.approx(factor)
    assert matrix.weight_decay * factor == pytest.approx(0.5)
    assert matrix.eps == pytest.approx(1e-8 * factor)
    gain = settings["norm.weight"]
    assert (gain.lr_scale, gain.weight_decay) == (1, 0)


@pytest.mark.parametrize("lr_scaling", ["width", "none"])
def test_training_is_that_of_torchs_optimizer_class_bit_for_bit(lr_scaling):
    training = TrainingConfig(lr_scaling=lr_scaling, grad_clip=1e9, eps=1e-6)
    state = TrainState.from_model(random_model(MOE).float())
    optimizer = build_optimizer(deepcopy(state), training, torch.float32, [Widen(2)])
    model = state.model()
    params = dict(model.named_parameters())
    theirs = torch.optim.AdamW(
        [
            {"params": [params[name] for name in names], **each._asdict()}
            for each, names in optimizer.groups.items()
        ],
        betas=(training.beta1, training.beta2),
        fused=True,
    )
    for step, lr in enumerate((1e-2, 3e-2, 1e-3)):
        tokens = windows(MOE, seed=step)
        optimizer.set_lr(lr)
        for group in theirs.param_groups:
            group["lr"] = lr * group["lr_scale"]
        for each, take_step in ((optimizer.model, optimizer.step), (model, theirs.step)):
            next_token_loss(each(tokens[:, :-1]), tokens).backward()
            take_step()
        theirs.zero_grad()
    ours = optimizer.into_train_state()
    adam = {name: theirs.state[param] for name, param in params.items()}
    assert is_identical(ours, TrainState(MOE, TrainState.from_model(model).weights, adam))
