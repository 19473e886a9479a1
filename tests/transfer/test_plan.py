"""Applying a plan: what is drawn, what is shared, what is consumed, and what is refused."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from config import Deepen, Upcycle, Widen
from tests.helpers.growth_laws import grow_with_plan
from tests.helpers.small_models import (
    DENSE,
    LEARNED_MOE,
    MOE,
    is_identical,
    random_model,
    random_train_state,
    state_tensors,
)
from transfer import TrainState, apply_plan, make_plan
from transfer.plan import make_tile

for_each_operator = pytest.mark.parametrize(
    "config, growth",
    [
        (DENSE, Upcycle(4)),
        (DENSE, Upcycle(1, 1)),
        (DENSE, Widen(2)),
        (LEARNED_MOE, Widen(3)),
        (MOE, Deepen(2)),
    ],
)


@for_each_operator
def test_the_old_model_stays_as_it_was_and_shares_no_memory(config, growth):
    old = random_train_state(config)
    before = deepcopy(old)
    for tensor in state_tensors(grow_with_plan(old, growth)[1]).values():
        tensor.fill_(torch.nan)
    assert is_identical(old, before)


@for_each_operator
def test_consuming_the_old_state_empties_it_and_leads_to_the_same_new_one(config, growth):
    old = random_train_state(config)
    _, new = grow_with_plan(old, growth)
    _, new_from_consumed = grow_with_plan(old, growth, consume=True)
    assert not old.weights and not old.adam
    assert is_identical(new, new_from_consumed)


@for_each_operator
def test_how_the_old_weights_lie_in_memory_changes_nothing(config, growth):
    old = random_train_state(config)
    _, new = grow_with_plan(old, growth)
    for tensors in (old.weights, *old.adam.values()):
        tensors |= {name: x.mT.contiguous().mT for name, x in tensors.items() if x.dim() > 1}
    _, new_from_transposed = grow_with_plan(old, growth)
    assert is_identical(new, new_from_transposed)


@for_each_operator
def test_the_seed_decides_what_is_drawn(config, growth):
    old = TrainState.from_model(random_model(config))
    first, again, other = (grow_with_plan(old, growth, seed=seed)[1] for seed in (3, 3, 4))
    assert is_identical(first, again) and not is_identical(first, other)


@for_each_operator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.double])
def test_growth_keeps_the_precision_of_weights_unless_noise_would_not_cancel_in_it(
    config, growth, dtype
):
    old = TrainState.from_model(random_model(config).to(dtype))
    _, new = grow_with_plan(old, growth)
    has_noise = isinstance(growth, Widen) and growth.noise > 0
    expected = torch.promote_types(dtype, torch.float32) if has_noise else dtype
    assert {weight.dtype for weight in new.weights.values()} == {expected}


@pytest.mark.parametrize("factor, noise, is_exact", [(2, 0, 1), (4, 0, 1), (3, 0, 0), (2, 0.1, 0)])
def test_what_divides_evenly_is_not_rounded(factor, noise, is_exact):
    old = TrainState.from_model(random_model(DENSE).bfloat16())
    _, new = grow_with_plan(old, Widen(factor, float(noise)))
    dtype = torch.bfloat16 if is_exact else torch.float32
    assert {weight.dtype for weight in new.weights.values()} == {dtype}


@pytest.mark.parametrize("noise", [0.1, 1.0])
@pytest.mark.parametrize("times", [2, 3])
def test_noise_cancels_over_the_copied_inputs_and_is_as_large_as_stated(times, noise):
    old = torch.randn(120, 80, generator=torch.Generator().manual_seed(0)).double() + 0.5
    row = make_tile("blocks.0.attn.q_proj.weight", noise=noise, embed=times, heads=times)
    exact = old.tile(times, times) / times
    added = row.grow_weight(old, torch.Generator()) - exact
    assert added.unflatten(-1, (times, -1)).sum(-2).abs().max() < 1e-12
    assert (added.std() / exact.std()).item() == pytest.approx(noise, rel=0.03)
    first, second, *_ = added.unflatten(0, (times, -1)).flatten(1)
    assert F.cosine_similarity(first, second, dim=0).abs() < 0.05, "output copies differ in noise"


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_copies_of_outputs_are_equal_without_noise_and_apart_with_it(noise):
    plan, new = grow_with_plan(TrainState.from_model(random_model(DENSE)), Widen(2, noise))
    is_equal = {}
    for name, row in plan.items():
        first, *others = row.output_copies(new.weights[name])
        if row.has_input_axis and others:
            is_equal[name] = torch.equal(first, others[0])
    assert is_equal and set(is_equal.values()) == {noise == 0}, is_equal


def test_the_worked_example_of_the_module_holds():
    row = make_tile("blocks.0.attn.q_proj.weight", heads=2, embed=2)
    assert (row.repeats, row.scale, row.grad_share) == ((2, 2), 1 / 2, 1 / 2)
    old = torch.randn(6, 4)
    half = torch.cat([old, old], 1) / 2
    assert torch.equal(row.grow_weight(old, torch.Generator()), torch.cat([half, half]))


def test_a_parameter_without_a_row_and_one_of_the_wrong_shape_are_named():
    old, name = TrainState.from_model(random_model(DENSE)), "blocks.1.mlp.up_proj.weight"
    config, plan = make_plan(DENSE, Widen(2))
    with pytest.raises(KeyError, match=name):
        apply_plan(config, {n: row for n, row in plan.items() if n != name}, old)
    with pytest.raises(ValueError, match=rf"{name} came out as \(20, 24\), not \(20, 48\)"):
        apply_plan(config, plan | {name: plan[name]._replace(repeats=(2, 1))}, old)


def test_a_state_moves_to_a_device_and_its_moments_to_another():
    state = random_train_state(DENSE)
    moved = state.to(torch.device("cpu"), adam=torch.device("meta"))
    assert all(weight.device.type == "cpu" for weight in moved.weights.values())
    assert all(x.is_meta for moments in moved.adam.values() for x in moments.values())
