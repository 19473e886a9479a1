"""Kernels that are compiled before they are needed are those that a phase launches."""

from dataclasses import replace

import pytest
import torch

from config import TrainingConfig
from tests.helpers.gpu_models import (
    BF16,
    CUDA,
    MOE,
    cuda_train_state,
    cuda_windows,
    needs_fused_kernels,
)
from tests.helpers.small_runs import small_run
from utils.optim.adamw import build_optimizer
from utils.schedule.phases import resolve_phases
from utils.training import kernels_ahead
from utils.training.evaluate import evaluate
from utils.training.kernels_ahead import KernelsAhead
from utils.training.step import train_step

TRAINING = TrainingConfig(steps_phase1=1, batch_size=3)


@pytest.fixture
def phases(tmp_path):
    """Phases whose kernels no other test has compiled."""
    model = replace(MOE, d_model=144, d_ff=120, vocab_size=113, num_experts=0)
    return resolve_phases(replace(small_run(tmp_path, TRAINING), model=model))


@needs_fused_kernels
def test_what_was_compiled_ahead_is_all_that_a_step_and_an_evaluation_launch(
    phases, tmp_path, monkeypatch
):
    from triton import knobs
    from triton.runtime.jit import JITFunction

    phase = phases[1]
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    KernelsAhead([phase], TRAINING, CUDA, BF16, eval_batch_size=4).wait(phase)
    compiled = []
    compile_kernel = JITFunction._do_compile
    monkeypatch.setattr(
        JITFunction, "_do_compile", lambda *args: compiled.append(args) or compile_kernel(*args)
    )
    optimizer = build_optimizer(cuda_train_state(phase.config), TRAINING, BF16)
    length = phase.config.seq_len
    train_step(optimizer, TRAINING, BF16, cuda_windows(phase.config, 3, length))
    evaluate(optimizer.model, cuda_windows(phase.config, 4, length), BF16, batch_size=4)
    assert not compiled
    monkeypatch.setattr(KernelsAhead, "take_step", lambda *_: pytest.fail("compiled again"))
    again = KernelsAhead([phase], TRAINING, CUDA, BF16, eval_batch_size=4)
    again.compile_phase(phase)


def test_a_run_goes_on_where_kernels_cannot_be_compiled_ahead(phases, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(kernels_ahead, "fused_kernels_available", lambda *_: True)
    monkeypatch.setattr(KernelsAhead, "compile_phase", fail)
    kernels = KernelsAhead(phases, TRAINING, torch.device("cpu"), BF16, 8)
    assert not any(kernels.compiled[phase.number].done() for phase in phases[1:])
    for phase in phases:
        kernels.wait(phase)
    assert capsys.readouterr().out.count("no compiler") == 1


def test_nothing_is_compiled_ahead_for_a_step_of_torchs_own_operations(phases, monkeypatch):
    monkeypatch.setattr(kernels_ahead, "fused_kernels_available", lambda *_: True)
    for option in ({"fused_kernels": False}, {"low_memory": True}):
        training = replace(TRAINING, **option)
        assert not KernelsAhead(phases, training, torch.device("cpu"), BF16, 8).compiled


def test_nobody_waits_for_ever_where_even_the_warning_fails(phases, monkeypatch):
    def fail(*_):
        raise BrokenPipeError

    monkeypatch.setattr(kernels_ahead, "fused_kernels_available", lambda *_: True)
    monkeypatch.setattr(KernelsAhead, "compile_phase", fail)
    monkeypatch.setattr(kernels_ahead.tqdm, "write", fail)
    kernels = KernelsAhead(phases, TRAINING, torch.device("cpu"), BF16, 8)
    for phase in phases:
        kernels.wait(phase)
