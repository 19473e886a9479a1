"""What upcycling alone does; tests/transfer/test_growth.py has the laws of every growth."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from config import InputError, Upcycle
from tests.helpers.growth_laws import grow_with_plan
from tests.helpers.small_models import (
    DENSE,
    LEARNED,
    MOE,
    logits,
    random_model,
    random_train_state,
    windows,
)
from transfer import TrainState, make_plan


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


def test_the_scale_multiplies_the_routers_initialisation():
    old, name = TrainState.from_model(random_model(DENSE)), "blocks.0.moe.router.weight"
    one, three = (
        grow_with_plan(old, Upcycle(4, router_init_scale=scale))[1].weights[name]
        for scale in (1.0, 3.0)
    )
    torch.testing.assert_close(three, 3 * one)


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
        torch.testing.assert_close(model(windows(DENSE)[:, :-1]).logits, logits(old))
