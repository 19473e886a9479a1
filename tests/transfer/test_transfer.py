"""What upcycling alone does; tests/transfer/test_growth.py has the laws of every growth."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from config import InputError, Upcycle
from models import SLM
from tests.helpers.growth_laws import grow_with_plan
from tests.helpers.small_models import (
    DENSE,
    LEARNED,
    MOE,
    gradients,
    logits,
    random_model,
    random_train_state,
    windows,
)
from transfer import TrainState, adamw_scales, make_plan
from transfer.plan import Tile


def mean_squared_gradients(state):
    """The mean over 24 batches of random tokens of the squared gradient of each parameter."""
    batches = [gradients(state, windows(state.config, 8, seed=seed)) for seed in range(24)]
    return {name: torch.stack([g[name] ** 2 for g in batches]).mean(0) for name in state.weights}


@pytest.mark.parametrize("config", [DENSE, LEARNED])
def test_reinitialising_takes_its_fraction_of_each_expert_and_leaves_the_rest(config):
    old = random_train_state(replace(config, d_ff=64))
    _, new = grow_with_plan(old, Upcycle(4, reinit_fraction=0.5))
    for layer in range(2):
        is_unit_kept = []
        for kind in ("gate_proj", "up_proj", "down_proj"):
            dense = old.weights[f"blocks.{layer}.mlp.{kind}.weight"]
            experts = new.weights[f"blocks.{layer}.moe.{kind}"]
            is_same = experts == dense
            units_last = is_same.transpose(1, 2) if kind == "down_proj" else is_same
            is_unit_kept.append(units_last.all(-1))
            assert (~is_same).float().mean() == 0.5
            before, after = dense.expand_as(experts)[~is_same], experts[~is_same]
            assert after.mean().item() == pytest.approx(before.mean().item(), abs=0.02)
            assert after.std().item() == pytest.approx(before.std().item(), rel=0.1)
        first = is_unit_kept[0]
        assert all(torch.equal(first, each) for each in is_unit_kept), "the same in each projection"
        assert (first.sum(-1) == 32).all() and len(first.unique(dim=0)) == 4
    _, exact = grow_with_plan(old, Upcycle(4))
    assert new.adam.keys() == exact.adam.keys()


@pytest.mark.parametrize("growth", [Upcycle(4), Upcycle(8), Upcycle(8, top_k=3)])
def test_second_moments_are_the_squared_gradients_that_experts_get_from_real_routing(growth):
    """1 / E^2 of the dense ones, as equal shares of the same tokens would have, is off by 2 to 4.
    Above 1 because unequal weights of the chosen experts have the larger squares."""
    torch.manual_seed(0)
    old = TrainState.from_model(SLM(DENSE).double())
    squares = mean_squared_gradients(old)
    old.adam = {
        name: {"step": torch.tensor(9.0), "exp_avg": square, "exp_avg_sq": square}
        for name, square in squares.items()
    }
    plan, new = grow_with_plan(old, growth)
    scales, new_squares = adamw_scales(plan, [growth]), mean_squared_gradients(new)
    experts = [name for name, row in plan.items() if isinstance(row, Tile) and row.repeats[0] > 1]
    assert len(experts) == 6
    for name in experts:
        carried = new.adam[name]["exp_avg_sq"]
        assert 1 < new_squares[name].sum() / carried.sum() < 1.5, name
        weighted = scales[name].norm_weight * carried.sum()
        assert_close(weighted, squares[plan[name].source].sum())


def test_the_scale_multiplies_the_routers_initialisation():
    old, name = TrainState.from_model(random_model(DENSE)), "blocks.0.moe.router.weight"
    one, three = (
        grow_with_plan(old, Upcycle(4, router_init_scale=scale))[1].weights[name]
        for scale in (1.0, 3.0)
    )
    assert_close(three, 3 * one)


def test_a_model_with_experts_is_not_upcycled_again():
    with pytest.raises(InputError, match="already has 5 experts"):
        make_plan(MOE, Upcycle(4))


def test_weights_of_the_experts_that_do_not_sum_to_one_are_caught():
    def softmax_over_all(router, x, out):
        weight_NE = F.linear(x[0], router.weight).softmax(-1)
        return weight_NE.gather(1, out[1].expert_ids_NC), out[1]

    old = random_train_state(DENSE)
    model = grow_with_plan(old, Upcycle(4))[1].model()
    for block in model.blocks:
        block.moe.router.register_forward_hook(softmax_over_all)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(model(windows(DENSE)[:, :-1]).logits, logits(old))
