"""The fused step's optimizers train as torch's does, captured or not, and keep all they are given.
All of it needs a GPU."""

from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from on_gpu import BF16, CONFIGS, CUDA, EACH, MOE, NEEDS_GPU, ODD, SETTINGS, at_rest, off, windows
from small import tensors
from torch.testing import assert_close

from config import Upcycle, Widen
from train import training_step
from transfer import rates
from utils.capture import Captured
from utils.optimizer import Plain, home, wake

pytestmark = NEEDS_GPU


@EACH
def test_waking_and_resting_leave_every_weight_and_moment_as_it_was(config):
    state = at_rest(config)
    state.adam = {
        name: {"step": torch.tensor(3.0), "exp_avg": w * 0.1, "exp_avg_sq": w.square()}
        for name, w in state.weights.items()
    }
    before = {key: value.clone() for key, value in tensors(state).items()}
    after = tensors(wake(state, SETTINGS, BF16).rest())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].to(CUDA), after[key]) for key in before)


def test_a_master_that_was_split_is_joined_bit_for_bit():
    """Zeros, denormals, ordinary numbers and the largest, at a tie of two bf16 and around it."""
    from models.fused.adamw import joined, split

    torch.manual_seed(0)
    high = torch.tensor([0x0000, 0x0001, 0x007F, 0x0080, 0x3F80, 0x3FFF, 0x7F7F], device=CUDA)
    low = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], device=CUDA)
    bits = ((high[:, None] << 16) + low).flatten().int()
    master = torch.cat([bits.view(torch.float32), torch.randn(1000, device=CUDA)])
    master = torch.cat([master, -master])
    assert torch.equal(joined(*split(master)).view(torch.int32), master.view(torch.int32))


@EACH
def test_at_rest_a_model_has_given_its_memory_to_the_masters(config):
    state = at_rest(config)
    masters = wake(state, SETTINGS, BF16)
    assert not state.weights
    training_step(masters, SETTINGS, BF16, windows(config, 2, 65))
    before, after = tensors(masters.snapshot()), tensors(masters.rest())
    assert before.keys() == after.keys()
    assert all(torch.equal(value.to(CUDA), after[key].to(CUDA)) for key, value in before.items())
    assert not masters.parts
    assert all(not p.numel() for p in masters.model.parameters() if p.dtype == BF16)


@pytest.mark.parametrize("config", [*CONFIGS.values(), ODD], ids=[*CONFIGS, "odd sizes"])
@pytest.mark.parametrize("growth", [(), (Upcycle(5), Widen(3))], ids=["", "at rates of their own"])
def test_a_step_is_that_of_torchs_adamw_on_float32_masters(config, growth):
    """Three steps with the same gradients; blocks of another age, and gradients to be clipped."""
    settings = replace(SETTINGS, lr_scaling="width", weight_decay=0.5, eps=1e-3)
    state, twin = at_rest(config), at_rest(config)
    young = {name for name in state.weights if "blocks.1" in name}
    for each in (state, twin):
        each.adam = {
            name: {"step": torch.tensor(9.0), "exp_avg": w * 0.1, "exp_avg_sq": w.square()}
            for name, w in each.weights.items()
            if name not in young
        }
    twin = twin.to(CUDA)
    masters = wake(state, settings, BF16, growth)
    plain = Plain(twin, settings, rates(twin.weights, growth))
    parts = masters.parts
    for step in range(3):
        torch.manual_seed(step)
        for leaf in masters.model.parameters():
            leaf.grad = torch.zeros_like(leaf)
        for name, p in plain.model.named_parameters():
            leaf, part = parts[name].leaf, parts[name].copy
            slope = torch.randn_like(p).to(leaf.dtype)
            leaf.grad.as_strided(part.shape, part.stride(), part.storage_offset()).copy_(slope)
            p.grad = slope.float()
        for optimizer in (masters, plain):
            optimizer.set_lr(1e-2)
        assert masters.step().item() == pytest.approx(plain.step().item(), rel=1e-4)
    got, want = masters.snapshot(), plain.rest()
    for name, weight in want.weights.items():
        assert_close(got.weights[name].to(CUDA), weight, rtol=1e-5, atol=1e-6)
        for kind, moment in want.adam[name].items():
            assert_close(got.adam[name][kind].to(CUDA), moment.to(CUDA), rtol=1e-4, atol=1e-9)
        assert_close(parts[name].copy.float().cpu(), got.weights[name], rtol=2**-8, atol=0.0)


def test_a_gradient_that_is_not_finite_changes_nothing_and_says_so():
    masters = wake(at_rest(MOE), SETTINGS, BF16)
    training_step(masters, SETTINGS, BF16, windows(MOE, 2, 65))
    before = {key: value.clone() for key, value in tensors(masters.snapshot()).items()}
    for leaf in masters.model.parameters():
        leaf.grad = torch.ones_like(leaf)
    masters.model.norm.weight.grad[0] = torch.nan
    assert not masters.step().isfinite()
    after = tensors(masters.snapshot())
    assert all(torch.equal(before[key], after[key]) for key in before)


@EACH
@pytest.mark.parametrize("micro", [None, 3], ids=["", "micro-batches"])
def test_a_captured_step_trains_as_the_same_step_does_uncaptured(config, micro):
    settings = replace(SETTINGS, micro_batch_size=micro)
    tokens = [windows(config, 4, 65, seed) for seed in range(4)]

    def trained(capture):
        optimizer = wake(at_rest(config), settings, BF16)
        step = partial(training_step, optimizer, settings, BF16)
        step = Captured(step, optimizer) if capture else step
        found = []
        for i in range(12):
            optimizer.set_lr(1e-4 * (i + 1))
            found.append(step(tokens[i % 4]).clone())
        return torch.stack(found), optimizer.rest()

    (free, state), (captured, other) = trained(False), trained(True)
    assert free[-1, 0] < free[0, 0] - 0.01
    assert_close(captured, free, rtol=5e-3, atol=5e-3)
    for name, weight in state.weights.items():
        assert off(other.weights[name], weight) < 5e-3, name
        assert other.adam[name]["step"] == 12


@pytest.mark.skipif(find_spec("flashoptim") is None, reason="no flashoptim")
@EACH
def test_the_lean_optimizer_keeps_weights_and_trains_alike(config):
    lean = replace(SETTINGS, lean=True)
    tokens = [windows(config, 4, 65, seed) for seed in range(4)]

    def trained(settings, steps, state):
        optimizer = wake(home(state, settings, CUDA), settings, BF16)
        for i in range(steps):
            optimizer.set_lr(1e-3)
            loss = training_step(optimizer, settings, BF16, tokens[i % 4])
        at_work = {name: weight.cpu() for name, weight in optimizer.weights().items()}
        at_rest = optimizer.rest()
        for name, weight in at_rest.weights.items():
            assert torch.equal(at_work[name], weight.cpu()), name
        return loss[0].item() if steps else None, at_rest

    start = at_rest(config)
    _, kept = trained(lean, 0, start)
    for name, weight in at_rest(config).weights.items():
        assert_close(kept.weights[name], weight.cpu(), rtol=3e-5, atol=1e-7)
    (exact, _), (loss, state) = trained(SETTINGS, 20, at_rest(config)), trained(lean, 20, kept)
    assert loss == pytest.approx(exact, abs=0.03)
    _, again = trained(lean, 0, home(state, lean, CUDA))
    for (name, kind), value in tensors(state).items():
        far = off(tensors(again)[name, kind], value)
        assert far < (0.02 if kind.startswith("exp") else 3e-5), (name, kind)
