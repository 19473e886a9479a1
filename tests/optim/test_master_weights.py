"""AdamW on float32 master weights trains as torch's does, and loses no bit of what it is given. All
of it needs a GPU."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from config import Upcycle, Widen
from models import next_token_loss
from tests.helpers.gpu_models import (
    BF16,
    CONFIGS,
    CUDA,
    MOE,
    ODD_SIZES,
    TRAINING,
    cuda_train_state,
    cuda_windows,
    for_each_config,
    needs_fused_kernels,
)
from tests.helpers.small_models import relative_error, state_tensors
from transfer import adamw_scales
from transfer.plan import param_shapes
from utils.optim.adamw import TorchAdamW, build_optimizer
from utils.runtime.device import autocast
from utils.training.step import train_step

pytestmark = needs_fused_kernels


def with_random_moments(state, without=()):
    """Gives each parameter moments but those whose names are in `without`."""
    state.adam = {
        name: {"step": torch.tensor(9.0), "exp_avg": weight * 0.1, "exp_avg_sq": weight.square()}
        for name, weight in state.weights.items()
        if name not in without
    }
    return state


def copy_tensors(state):
    return {key: value.clone() for key, value in state_tensors(state).items()}


@for_each_config
def test_building_the_optimizer_and_taking_its_state_changes_no_bit(config):
    state = with_random_moments(cuda_train_state(config))
    before = copy_tensors(state)
    after = state_tensors(build_optimizer(state, TRAINING, BF16).into_train_state())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].to(CUDA), after[key]) for key in before)


def test_a_master_weight_that_was_split_is_joined_bit_for_bit():
    """They are zeros, denormals, ordinary numbers and the largest, at ties of two bf16 numbers and
    around them."""
    from models.fused.adamw import join_master, split_master

    torch.manual_seed(0)
    high = torch.tensor([0x0000, 0x0001, 0x007F, 0x0080, 0x3F80, 0x3FFF, 0x7F7F], device=CUDA)
    low = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], device=CUDA)
    bits = ((high[:, None] << 16) + low).flatten().int()
    master = torch.cat([bits.view(torch.float32), torch.randn(1000, device=CUDA)])
    master = torch.cat([master, -master])
    joined = join_master(*split_master(master))
    assert torch.equal(joined.view(torch.int32), master.view(torch.int32))


@for_each_config
def test_a_snapshot_is_the_state_whose_memory_the_model_then_gives_up(config):
    state = cuda_train_state(config)
    optimizer = build_optimizer(state, TRAINING, BF16)
    assert not state.weights
    optimizer.set_lr(1e-3)
    train_step(optimizer, TRAINING, BF16, cuda_windows(config, 2, 65))
    weights = {name: weight.clone() for name, weight in optimizer.weights().items()}
    before = copy_tensors(optimizer.snapshot())
    after = state_tensors(optimizer.into_train_state())
    assert before.keys() == after.keys()
    assert all(torch.equal(value.to(CUDA), after[key]) for key, value in before.items())
    assert all(torch.equal(weight, after[name, "weight"]) for name, weight in weights.items())
    assert all(not p.numel() for p in optimizer.model.parameters() if p.dtype == BF16)


@pytest.mark.parametrize("config", [*CONFIGS.values(), ODD_SIZES], ids=[*CONFIGS, "odd sizes"])
@pytest.mark.parametrize("growth_history", [(), (Upcycle(5), Widen(3))], ids=["", "grown"])
def test_a_step_is_that_of_torchs_adamw_on_float32_weights(config, growth_history):
    """Both take three steps with the same gradients, which are clipped; one block is younger."""
    training = replace(TRAINING, weight_decay=0.5, eps=1e-3)
    state, same_state = cuda_train_state(config), cuda_train_state(config)
    younger = {name for name in state.weights if "blocks.1" in name}
    same_state = with_random_moments(same_state, without=younger).to(CUDA)
    scales = adamw_scales(same_state.weights, growth_history)
    torchs = TorchAdamW(same_state, training, scales)
    masters = build_optimizer(with_random_moments(state, younger), training, BF16, growth_history)
    parts = masters.parts
    for step in range(3):
        torch.manual_seed(step)
        for leaf in masters.model.parameters():
            leaf.grad = torch.zeros_like(leaf)
        for name, param in torchs.model.named_parameters():
            leaf, copy = parts[name].leaf, parts[name].copy
            gradient = torch.randn_like(param).to(leaf.dtype)
            own = leaf.grad.as_strided(copy.shape, copy.stride(), copy.storage_offset())
            own.copy_(gradient)
            param.grad = gradient.float()
        for optimizer in (masters, torchs):
            optimizer.set_lr(1e-2)
        assert masters.step().item() == pytest.approx(torchs.step().item(), rel=1e-4)
    result, expected = masters.snapshot(), torchs.into_train_state()
    for name, weight in expected.weights.items():
        assert_close(result.weights[name].to(CUDA), weight, rtol=1e-5, atol=1e-6)
        for kind, moment in expected.adam[name].items():
            assert_close(result.adam[name][kind].to(CUDA), moment.to(CUDA), rtol=1e-4, atol=1e-9)
        copy = parts[name].copy.float().cpu()
        assert_close(copy, result.weights[name], rtol=2**-8, atol=0.0)


@for_each_config
def test_gradients_of_micro_batches_add_up_in_float32(config):
    """Those of 64 equal micro-batches are those of one; sums in bf16 would be off by 2 %."""

    def add_up_gradients(count):
        training = replace(TRAINING, micro_batch_size=2)
        model = build_optimizer(cuda_train_state(config), training, BF16).model
        tokens = cuda_windows(config, 2, 65)
        for _ in range(count):
            with autocast(CUDA, BF16):
                loss = next_token_loss(model(tokens[:, :-1]), tokens)
            (loss / count).backward()
        return [leaf.grad for leaf in model.parameters()]

    for one, many in zip(add_up_gradients(1), add_up_gradients(64), strict=True):
        assert one.dtype == many.dtype == torch.float32
        assert relative_error(many, one) < 5e-3


@for_each_config
def test_a_step_in_micro_batches_is_that_of_torchs_adamw_on_the_same_gradients(config):
    """The gradients of bf16 leaves are in float32 here, which the kernel must read as such."""
    training = replace(TRAINING, micro_batch_size=2)
    torchs = TorchAdamW(cuda_train_state(config), training, adamw_scales(param_shapes(config), ()))
    masters = build_optimizer(cuda_train_state(config), training, BF16)
    for name, param in torchs.model.named_parameters():
        leaf, copy = masters.parts[name].leaf, masters.parts[name].copy
        if leaf.grad is None:
            leaf.grad = torch.zeros_like(leaf, dtype=torch.float32)
        param.grad = torch.randn_like(param)
        own = leaf.grad.as_strided(copy.shape, copy.stride(), copy.storage_offset())
        own.copy_(param.grad)
    for optimizer in (masters, torchs):
        optimizer.set_lr(1e-2)
    assert masters.step().item() == pytest.approx(torchs.step().item(), rel=1e-5)
    result, expected = masters.snapshot(), torchs.into_train_state()
    for name, weight in expected.weights.items():
        assert_close(result.weights[name].to(CUDA), weight, rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_not_finite_changes_nothing_and_shows_in_the_norm():
    optimizer = build_optimizer(cuda_train_state(MOE), TRAINING, BF16)
    optimizer.set_lr(1e-3)
    train_step(optimizer, TRAINING, BF16, cuda_windows(MOE, 2, 65))
    before = copy_tensors(optimizer.snapshot())
    for leaf in optimizer.model.parameters():
        leaf.grad = torch.ones_like(leaf)
    optimizer.model.norm.weight.grad[0] = torch.nan
    assert not optimizer.step().isfinite()
    after = state_tensors(optimizer.snapshot())
    assert all(torch.equal(before[key], after[key]) for key in before)
