"""In float64, growing and then training is training and then growing, and no rule can be broken."""

from dataclasses import replace

import pytest
import torch
from small import CONFIGS, DENSE, MOE

from config import Deepen, TrainingConfig, Upcycle, Widen
from models import SLM
from transfer import Rate, State, plan_for, rates
from transfer.plan import shapes
from utils.optimizer import wake
from utils.square import ALLOWED, SETTINGS, Square, breaches, same

WIDENINGS = [Widen(2, noise=0.0), Widen(3, noise=0.0)]
DEEPENINGS = [Deepen(2, where) for where in ("interleaved", "middle", "end")]
SQUARES = [(name, how) for name in ("dense", "moe") for how in (*WIDENINGS, DEEPENINGS[0])]
SQUARES += [("learned-moe", how) for how in (WIDENINGS[1], *DEEPENINGS[1:])]
IDS = [f"{name}-{type(how).__name__}" for name, how in SQUARES]


@pytest.mark.parametrize("name, how", SQUARES, ids=IDS)
def test_growing_then_training_is_training_then_growing(name, how):
    assert max(Square(CONFIGS[name], how).gap()) < ALLOWED


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("how", [WIDENINGS[0], DEEPENINGS[0]], ids=["widen", "deepen"])
def test_a_breach_of_any_rule_is_caught(config, how):
    square = Square(config, how)
    assert square.gap()[0] < ALLOWED
    for name, breach in breaches(how).items():
        # Not much, but with the smallest of eps, the difference is a million times the rounding.
        assert square.gap(breach)[0] > 1e6 * ALLOWED, name


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_decay_commutes_where_it_is_as_much_stronger_as_the_rate_is_smaller(config):
    square = Square(config, Widen(2, noise=0.0), replace(SETTINGS, weight_decay=0.3))
    assert max(square.gap()) < ALLOWED
    assert square.gap(same(decay=1.0))[0] > 1e9 * ALLOWED


def test_rates_follow_every_copy_of_an_axis_and_new_parameters_follow_their_axes():
    config, growth = DENSE, [Widen(2), Upcycle(4), Deepen(1), Widen(3)]
    for how in growth:
        config, _ = plan_for(config, how)
    found = rates(shapes(config), growth)
    assert found["blocks.0.attn.q_proj.weight"] == Rate(lr=1 / 6, decay=6, eps=1 / 6)
    assert found["blocks.2.attn.q_proj.weight"] == found["blocks.0.attn.q_proj.weight"]
    assert found["blocks.0.moe.down_proj"] == Rate(lr=1 / 6, decay=6, eps=1 / 24)
    assert found["blocks.0.moe.router.weight"] == Rate(lr=1 / 6, decay=6, eps=1 / 4)
    assert found["embed.weight"] == found["norm.weight"] == Rate(lr=1, decay=1, eps=1 / 6)
    assert set(rates(shapes(config), []).values()) == {Rate()}


@pytest.mark.parametrize("scaling, want", [("width", 1 / 6), ("same", 1.0)])
def test_the_setting_reaches_the_optimizer(scaling, want):
    settings = TrainingConfig(lr_scaling=scaling, weight_decay=0.5)
    optimizer = wake(State.of(SLM(DENSE)), settings, torch.float32, [Widen(2), Widen(3)])
    optimizer.set_lr(0.25)
    of = {id(p): group for group in optimizer.adamw.param_groups for p in group["params"]}
    group = of[id(optimizer.model.blocks[0].attn.q_proj.weight)]
    assert group["lr"] == pytest.approx(0.25 * want)
    assert group["weight_decay"] * want == pytest.approx(0.5)
    assert group["eps"] == pytest.approx(1e-8 * want)
    gains = of[id(optimizer.model.norm.weight)]
    assert (gains["lr"], gains["weight_decay"]) == (0.25, 0)
