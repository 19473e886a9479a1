"""A captured step trains as the same step does when its operations are launched one by one."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from config import TrainingConfig, Upcycle, Widen
from models import SLM
from tests.helpers.gpu_models import (
    BF16,
    CUDA,
    TRAINING,
    cuda_train_state,
    cuda_windows,
    for_each_config,
    needs_fused_kernels,
)
from tests.helpers.small_models import DENSE, relative_error
from transfer import TrainState
from utils.optim.adamw import build_optimizer
from utils.optim.cuda_graph import (
    MIN_CAPTURED_STEPS,
    CapturedStep,
    is_capturable,
    wants_cuda_graph,
)
from utils.training.step import train_step


@pytest.mark.parametrize(
    "setting, is_wanted", [("on", (True, True)), ("off", (False, False)), ("auto", (False, True))]
)
def test_a_capture_is_wanted_always_or_never_or_where_a_phase_is_long_enough(setting, is_wanted):
    training = TrainingConfig(cuda_graph=setting)
    lengths = MIN_CAPTURED_STEPS - 1, MIN_CAPTURED_STEPS
    assert tuple(wants_cuda_graph(training, steps) for steps in lengths) == is_wanted


def test_torchs_own_optimizer_is_not_captured():
    state = TrainState.from_model(SLM(DENSE))
    assert not is_capturable(build_optimizer(state, TrainingConfig(), torch.float32))


@needs_fused_kernels
@for_each_config
@pytest.mark.parametrize("micro_batch_size", [None, 3], ids=["", "micro-batches"])
def test_a_captured_step_trains_as_the_same_step_does_uncaptured(config, micro_batch_size):
    training = replace(TRAINING, micro_batch_size=micro_batch_size)
    tokens = [cuda_windows(config, 4, 65, seed) for seed in range(4)]

    def train(is_captured):
        grown = Upcycle(5), Widen(3)  # so that gradients are weighted in their norm
        optimizer = build_optimizer(cuda_train_state(config), training, BF16, grown)
        assert is_capturable(optimizer)
        step = partial(train_step, optimizer, training, BF16)
        step = CapturedStep(step, optimizer) if is_captured else step
        metrics = []
        for i in range(12):
            optimizer.set_lr(1e-4 * (i + 1))
            metrics.append(step(tokens[i % 4]).clone())
        return torch.stack(metrics), optimizer.into_train_state()

    (metrics, state), (captured_metrics, captured_state) = train(False), train(True)
    assert metrics[-1, 0] < metrics[0, 0] - 0.01
    assert_close(captured_metrics, metrics, rtol=5e-3, atol=5e-3)
    for name, weight in state.weights.items():
        assert relative_error(captured_state.weights[name], weight) < 5e-3, name
        assert_close(captured_state.adam[name]["step"], torch.tensor(12.0, device=CUDA))
