"""The low-memory optimizer keeps weights to 24 bits and trains like the exact one. All of it needs
a GPU and flashoptim."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch.testing import assert_close

from config import Upcycle, Widen
from tests.helpers.gpu_models import (
    BF16,
    CUDA,
    TRAINING,
    cuda_train_state,
    cuda_windows,
    for_each_config,
    needs_fused_kernels,
)
from tests.helpers.small_models import relative_error, state_tensors
from utils.optim.adamw import build_optimizer, place_state
from utils.training.step import train_step

pytestmark = [
    needs_fused_kernels,
    pytest.mark.skipif(find_spec("flashoptim") is None, reason="needs flashoptim"),
]
LOW_MEMORY = replace(TRAINING, low_memory=True)


def train(state, training, steps):
    """Returns the last loss (None for no steps), and the state after training."""
    optimizer = build_optimizer(place_state(state, training, CUDA), training, BF16)
    loss = None
    for step in range(steps):
        optimizer.set_lr(1e-3)
        tokens = cuda_windows(state.config, 4, 65, seed=step % 4)
        loss = train_step(optimizer, training, BF16, tokens)[0].item()
    weights = {name: weight.cpu() for name, weight in optimizer.weights().items()}
    state = optimizer.into_train_state()
    for name, weight in state.weights.items():
        assert torch.equal(weights[name], weight.cpu()), name
    return loss, state


@for_each_config
@pytest.mark.parametrize("growth_history", [(), (Upcycle(5), Widen(3))], ids=["", "grown"])
def test_the_norm_by_which_it_clips_is_that_of_the_exact_optimizer(config, growth_history):
    norms = []
    for training in (TRAINING, LOW_MEMORY):
        state = place_state(cuda_train_state(config), training, CUDA)
        optimizer = build_optimizer(state, training, BF16, growth_history)
        norms.append(train_step(optimizer, training, BF16, cuda_windows(config, 4, 65))[3].item())
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


@for_each_config
def test_it_keeps_weights_and_moments_and_trains_like_the_exact_optimizer(config):
    start = cuda_train_state(config)
    _, untrained = train(cuda_train_state(config), LOW_MEMORY, steps=0)
    for name, weight in start.weights.items():
        assert_close(untrained.weights[name], weight.cpu(), rtol=3e-5, atol=1e-7)
    exact_loss, _ = train(start, TRAINING, steps=20)
    loss, trained = train(untrained, LOW_MEMORY, steps=20)
    assert loss == pytest.approx(exact_loss, abs=0.03)
    before = state_tensors(trained)
    _, reloaded = train(trained, LOW_MEMORY, steps=0)
    after = state_tensors(reloaded)
    assert after.keys() == before.keys()
    for (name, kind), value in before.items():
        tolerance = 0.02 if kind.startswith("exp") else 3e-5
        assert relative_error(after[name, kind], value) < tolerance, (name, kind)
