import torch

from config import Deepen, TrainingConfig, Upcycle, Widen
from tests.helpers.small_models import DENSE
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
    assert scales["blocks.0.attn.q_proj.weight"] == q_proj
    assert scales["blocks.2.attn.q_proj.weight"] == q_proj, "a block that came between"
    assert scales["blocks.0.moe.down_proj"] == AdamWScale(lr=1 / 6, weight_decay=6, eps=1 / 24)
    assert scales["blocks.0.moe.router.weight"] == AdamWScale(lr=1 / 6, weight_decay=6, eps=1 / 4)
    assert scales["embed.weight"] == scales["norm.weight"] == AdamWScale(eps=1 / 6)


def test_without_a_growth_every_scale_is_one():
    assert set(adamw_scales(grown_names(), []).values()) == {AdamWScale()}


def test_settings_multiply_decay_and_eps_and_gains_do_not_decay():
    training = TrainingConfig(weight_decay=0.5, eps=1e-6)
    scale = AdamWScale(lr=0.25, weight_decay=4.0, eps=0.5)
    assert scale.settings(training, torch.ones(3, 2)) == ParamSettings(0.25, 2.0, 5e-7)
    assert scale.settings(training, torch.ones(3)) == ParamSettings(0.25, 0.0, 5e-7)
