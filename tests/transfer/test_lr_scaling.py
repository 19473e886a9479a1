import pytest
import torch

from config import Deepen, TrainingConfig, Upcycle, Widen
from tests.helpers.growth_laws import grow_with_plan
from tests.helpers.small_models import DENSE, for_each_config, gradients, random_train_state
from transfer import AdamWScale, adamw_scales, make_plan
from transfer.lr_scaling import ParamSettings
from transfer.plan import param_shapes

GROWTHS = [Widen(2), Upcycle(4), Deepen(1), Widen(3)]


def grown_names():
    config = DENSE
    for growth in GROWTHS:
        config, _ = make_plan(config, growth)
    return list(param_shapes(config))


def test_scales_follow_every_copy_of_an_axis_and_new_parameters_follow_their_axes():
    scales = adamw_scales(grown_names(), GROWTHS)
    q_proj = AdamWScale(lr=1 / 6, weight_decay=6, eps=1 / 6)
    down_proj = AdamWScale(lr=1 / 6, weight_decay=6, eps=1 / (6 * 8**0.5), norm_weight=2)
    router = AdamWScale(lr=1 / 6, weight_decay=6, norm_weight=1 / 6)
    table = AdamWScale(eps=1 / 6, norm_weight=6)
    assert scales["blocks.0.attn.q_proj.weight"] == pytest.approx(q_proj)
    assert scales["blocks.2.attn.q_proj.weight"] == pytest.approx(q_proj), "a block in between"
    assert scales["blocks.0.moe.down_proj"] == pytest.approx(down_proj), "2 of 4 experts"
    assert scales["blocks.0.moe.router.weight"] == pytest.approx(router)
    assert scales["embed.weight"] == scales["norm.weight"] == pytest.approx(table)


@for_each_config
@pytest.mark.parametrize("growth", [Widen(2, noise=0.0), Widen(3, noise=0.0)])
def test_widening_keeps_each_gradients_squared_norm_as_it_is_weighted(config, growth):
    old = random_train_state(config)
    plan, new = grow_with_plan(old, growth)
    scales, grads = adamw_scales(plan, [growth]), gradients(new)
    for name, row in plan.items():
        before = old.adam[row.source]["exp_avg"].square().sum()
        torch.testing.assert_close(scales[name].norm_weight * grads[name].square().sum(), before)


def test_without_a_growth_every_scale_is_one():
    assert set(adamw_scales(grown_names(), []).values()) == {AdamWScale()}


def test_settings_multiply_decay_and_eps_and_gains_do_not_decay():
    training = TrainingConfig(weight_decay=0.5, eps=1e-6)
    scale = AdamWScale(lr=0.25, weight_decay=4.0, eps=0.5)
    assert scale.settings(training, torch.ones(3, 2)) == ParamSettings(0.25, 2.0, 5e-7)
    assert scale.settings(training, torch.ones(3)) == ParamSettings(0.25, 0.0, 5e-7)
