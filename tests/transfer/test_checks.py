import math
from dataclasses import replace

import pytest
import torch

from config import Deepen, InputError, Tolerance, Upcycle, Widen
from tests.helpers.small_models import (
    DENSE,
    LEARNED,
    MOE,
    for_each_config,
    random_model,
    windows,
)
from transfer import TrainState, apply_plan, make_plan
from transfer.checks import (
    MAX_LOSS_CHANGE,
    GrowthError,
    PlanChecker,
    broken_limits,
    compare_outputs,
    grow,
    match_plan_blocks,
    measure_rounding,
    resolve_tolerance,
)
from transfer.plan import Tile
from transfer.probe import ProbeOutput, run_probe

V, B, T = 7, 4, 256
LIMIT = 1e-3
ALL_LAWS = "logit loss weights"
ONE_LAYER = replace(DENSE, n_layers=1)
OPERATORS = [
    (DENSE, Upcycle(5)),
    (LEARNED, Widen(3, 0.5)),
    (MOE, Widen(2, 0.5)),
    (MOE, Widen(2, 0.0)),
    (MOE, Deepen(3)),
]


def random_state(config, dtype=torch.double):
    return TrainState.from_model(random_model(config).to(dtype))


def probe_output(layers=2):
    """Returns what a model might compute on 1,024 tokens; all logits and losses are 1."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(B, layers, T, 4, generator=generator).argsort(-1)
    expert_ids = order[..., :2].sort(-1).values
    margins = torch.full((B, layers, T), LIMIT / 2)
    return ProbeOutput(torch.ones(B, T, V), None, torch.ones(B, T), expert_ids, margins)


def rerouted(output, *tokens):
    """Returns the output with another first expert for tokens (window, layer, position)."""
    expert_ids = output.expert_ids_BLTC.clone()
    for window, layer, position in tokens:
        expert_ids[window, layer, position, 0] = 99
    return output._replace(expert_ids_BLTC=expert_ids)


def drift_and_broken_limits(before, after, layers=(0, 1)):
    drift = replace(
        compare_outputs(before, after, list(layers)), logit_limit=LIMIT, margin_limit=LIMIT
    )
    return drift, broken_limits(drift, LIMIT / 10)


def limits_broken_by(tamper, config, growth, name):
    """Returns the limits that break where `tamper` has its way with one grown weight."""
    old = random_state(config)
    new_config, plan = make_plan(config, growth)
    checker = PlanChecker()

    def inspect(param, row, source, new):
        if param == name:
            tamper(new)
        checker(param, row, source, new)

    new = apply_plan(new_config, plan, old, inspect=inspect)
    outputs = (run_probe(s.model(), windows(config)) for s in (old, new))
    drift = compare_outputs(*outputs, match_plan_blocks(plan))
    assert checker.worst()[0] == name or "router" in name
    drift = replace(drift, logit_limit=1e-10, margin_limit=1e-10, **checker.summary())
    return " ".join(broken_limits(drift, 1e-10))


@pytest.mark.parametrize("dtype", [torch.double, torch.float32], ids=str)
@pytest.mark.parametrize("config, growth", OPERATORS)
def test_an_exact_growth_passes_and_is_measured(config, growth, dtype):
    new, drift = grow(random_state(config, dtype), growth, windows(config))
    assert new.config == make_plan(config, growth)[0]
    assert drift.max_logit_diff <= drift.logit_limit < 1e-4
    assert abs(drift.loss_drift) < 2 * drift.logit_limit and abs(drift.kl) < 1e-10
    assert drift.plan_error <= drift.plan_limit < 1e-6
    assert (drift.plan_error == 0) == (not isinstance(growth, Widen) or not growth.noise)
    assert drift.max_logit_diff_fp32 < 1e-4
    assert drift.loss_after == pytest.approx(drift.loss_before)
    assert drift.probe_tokens == 3 * 13 and drift.judged_share == 1
    assert drift.top1_changed == drift.flipped == drift.flip_margin == 0
    assert (drift.router_std is None) == isinstance(growth, Widen)
    assert (drift.noise_std is not None) == (isinstance(growth, Widen) and growth.noise > 0)
    assert (drift.copy_distance is None) == isinstance(growth, Deepen)
    if new.config.num_experts:
        assert 0 <= drift.load_min <= 1 / new.config.num_experts <= drift.load_max <= 1


@pytest.mark.parametrize("config, growth", OPERATORS)
def test_float32_weights_are_judged_in_float64(config, growth):
    """Only the rounding of weights is left: none without noise, and far less than float32's."""
    _, drift = grow(random_state(config, torch.float32), growth, windows(config))
    if isinstance(growth, Widen) and growth.noise:
        assert 1e-13 < drift.max_logit_diff < drift.max_logit_diff_fp32 / 3
    else:
        assert drift.max_logit_diff < 1e-12


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("config, growth", OPERATORS)
def test_the_limit_grows_with_the_logits(config, growth, scale):
    """A model with logits of 1,000 passes like one with logits of 0.001."""
    state = random_state(replace(config, logit_scale=scale), torch.float32)
    for seed in range(3):
        _, drift = grow(state, growth, windows(config), seed)
        assert drift.max_logit_diff <= drift.logit_limit < 1e-4 * scale


@pytest.mark.parametrize("config, growth", OPERATORS)
def test_a_device_without_float64_is_judged_by_the_floor_of_float32(config, growth, monkeypatch):
    monkeypatch.setattr("transfer.probe.judging_dtype", lambda device: torch.float32)
    state = random_state(config, torch.float32)
    _, drift = grow(state, growth, windows(config))
    assert drift.max_logit_diff == drift.max_logit_diff_fp32 <= drift.logit_limit
    assert 1e-7 < drift.logit_limit < 1e-3


@pytest.mark.parametrize("config, growth", OPERATORS)
def test_a_relative_error_of_1e_6_in_any_matrix_is_caught_and_named(config, growth):
    """Each of these errors is far below what the logits may show."""
    new_config, plan = make_plan(config, growth)
    tiled = [name for name, row in plan.items() if isinstance(row, Tile)]
    for name in tiled:
        state = random_state(config, torch.float32)
        checker = PlanChecker()

        def inspect(param, row, old, new, spoiled=name, checker=checker):
            if param == spoiled:
                new.mul_(1 + 1e-6)
            checker(param, row, old, new)

        apply_plan(new_config, plan, state, inspect=inspect)
        worst, error, limit = checker.worst()
        assert worst == name and error > limit


@pytest.mark.parametrize("growth", [Deepen(2, init="copy"), Upcycle(5, reinit_fraction=0.5)])
def test_a_growth_that_changes_the_function_is_measured_and_held_to_a_limit_of_its_own(growth):
    state, probe = random_state(DENSE), windows(DENSE)
    new, drift = grow(state, growth, probe)
    assert new.config == make_plan(DENSE, growth)[0] and drift.max_logit_diff > 1e-3
    assert drift.plan_error < 1e-12 and abs(drift.loss_drift) < MAX_LOSS_CHANGE
    for name in ("max_logit_drift", "max_loss_drift"):
        tight = replace(growth, tolerance=Tolerance(**{name: 1e-3}))
        with pytest.raises(GrowthError, match=rf"moved by .* \({name}: 0.001\)"):
            grow(state, tight, probe)


def test_routing_that_changed_with_the_function_is_no_fault_and_excuses_no_logit():
    _, drift = grow(random_state(MOE), Deepen(2, "middle", "copy"), windows(MOE))
    assert drift.flipped > 1 and drift.max_logit_diff > 1e-3


@pytest.mark.parametrize("noise, low, high", [(0.0, 0.0, 0.0), (0.1, 0.1, 0.2), (1.0, 1.0, 1.5)])
def test_the_distance_of_copies_is_about_the_noise_times_root_two(noise, low, high):
    _, drift = grow(random_state(LEARNED), Widen(2, noise), windows(LEARNED))
    assert low <= drift.copy_distance <= high


@pytest.mark.parametrize(
    "config, growth, name, tamper, laws",
    [
        (DENSE, Widen(2), "blocks.1.attn.o_proj.weight", lambda w: w.mul_(1.5), ALL_LAWS),
        (DENSE, Widen(2), "norm.weight", lambda w: w.fill_(math.nan), ALL_LAWS),
        (DENSE, Widen(2), "embed.weight", lambda w: w[0, 0].fill_(math.inf), ALL_LAWS),
        (MOE, Deepen(1), "blocks.2.attn.o_proj.weight", lambda w: w.fill_(0.1), ALL_LAWS),
        (DENSE, Upcycle(4), "blocks.0.moe.up_proj", lambda w: w[1].mul_(2), ALL_LAWS),
        (MOE, Widen(2), "blocks.0.moe.router.weight", lambda w: w.neg_(), "loss routing weights"),
        (ONE_LAYER, Upcycle(4), "blocks.0.moe.router.weight", torch.zero_, "spread"),
    ],
)
def test_a_weight_that_breaks_the_function_is_named_with_each_limit(
    config, growth, name, tamper, laws
):
    broken = limits_broken_by(tamper, config, growth, name)
    assert broken and all(law in broken for law in laws.split())


@for_each_config
def test_growing_a_model_that_holds_a_nan_is_an_error(config):
    old = random_state(config)
    old.weights["blocks.0.attn.v_proj.weight"][0, 0] = math.nan
    with pytest.raises(GrowthError, match="a logit moved by nan") as raised:
        grow(old, Deepen(1), windows(config))
    assert raised.value.drift.to_json()["max_logit_diff"] is None, "which JSON can hold"


def test_the_error_says_what_moved_and_how_far_it_may():
    zero = Widen(2, tolerance=Tolerance(max_logit_drift=0.0))
    with pytest.raises(GrowthError, match=r"^Widen .* a logit moved by .*max_logit_drift: 0\)"):
        grow(random_state(DENSE, torch.float32), zero, windows(DENSE))
    with pytest.raises(InputError, match="already has"):
        grow(random_state(MOE), Upcycle(), windows(MOE))


@pytest.mark.parametrize("name", ["blocks.0.moe.router.weight", "blocks.1.attn.o_proj.weight"])
def test_noise_that_is_missing_on_one_matrix_is_noticed(name):
    config, plan = make_plan(MOE, Widen(2))
    plan[name] = plan[name]._replace(noise=0.0)
    checker = PlanChecker()

    def inspect(param, row, old, new):
        checker(param, row._replace(noise=0.1), old, new)

    apply_plan(config, plan, random_state(MOE), inspect=inspect)
    assert checker.summary()["noise_std"] == 0
    drift = replace(
        compare_outputs(probe_output(), probe_output(), [0, 1]),
        logit_limit=LIMIT,
        margin_limit=LIMIT,
    )
    (broken,) = broken_limits(replace(drift, **checker.summary()), LIMIT)
    assert broken == "a matrix's noise is off what was asked for by 1 (allowed: 0.3)"


def test_a_moved_logit_and_a_moved_loss_are_told_apart():
    old = probe_output()
    logits, loss = old.hidden_BTD.clone(), old.loss_BT.clone()
    logits[3, 200, 2] -= 0.01
    loss[1, 7] += 1.0
    assert drift_and_broken_limits(old, old)[1] == []
    assert drift_and_broken_limits(old, old._replace(hidden_BTD=logits))[1] == [
        "a logit moved by 0.01 (max_logit_drift: 0.001)"
    ]
    (broken,) = drift_and_broken_limits(old, old._replace(loss_BT=loss))[1]
    assert broken.startswith("the loss moved by 0.000977")


@pytest.mark.parametrize("layer", [0, 1])
def test_one_flipped_token_in_a_thousand_excuses_itself_and_what_follows_in_its_window(layer):
    old = probe_output()
    new = rerouted(old, (2, layer, 100))
    logits = new.hidden_BTD.clone()
    logits[2, 100:, 3] += 5
    drift, broken = drift_and_broken_limits(old, new._replace(hidden_BTD=logits))
    assert (drift.flipped, drift.max_logit_diff, broken) == (1, 0, [])
    assert drift.judged_share == 1 - 156 / (B * T)
    for window, position in [(2, 99), (1, 100), (3, 255)]:
        logits = new.hidden_BTD.clone()
        logits[window, position, 3] += 5
        drift, broken = drift_and_broken_limits(old, new._replace(hidden_BTD=logits))
        assert drift.max_logit_diff == 5 and "a logit moved" in broken[0]
    loss = new.loss_BT.clone()
    loss[2, 150] += 1
    _, broken = drift_and_broken_limits(old, new._replace(loss_BT=loss))
    assert "the loss moved" in broken[0]


def test_more_flipped_tokens_than_one_in_a_thousand_are_not_excused():
    old = probe_output()
    drift, _ = drift_and_broken_limits(old, rerouted(old, (0, 0, 9), (0, 1, 9)))
    assert drift.flipped == 1, "one token in two layers"
    drift, broken = drift_and_broken_limits(old, rerouted(old, (0, 0, 200), (3, 1, 200)))
    assert drift.flipped == 2 and "the routing of 2 probe tokens changed" in broken[0]


def test_a_token_may_leave_an_expert_only_where_it_led_by_as_little_as_rounding_moves():
    old = probe_output()
    old.margin_BLT[1, 0, 250] = 2 * LIMIT
    assert drift_and_broken_limits(old, rerouted(old, (1, 1, 250)))[1] == []
    drift, broken = drift_and_broken_limits(old, rerouted(old, (1, 0, 250)))
    assert drift.flip_margin == pytest.approx(2 * LIMIT)
    assert broken == ["a token left an expert that led by 0.002 (allowed: 0.001)"]


def test_one_flip_cannot_excuse_most_of_the_probe():
    """With one window, a flip at its start would leave nothing to judge."""
    old = ProbeOutput(*(part if part is None else part[:1] for part in probe_output()))
    assert drift_and_broken_limits(old, rerouted(old, (0, 0, 200)))[1] == []
    drift, broken = drift_and_broken_limits(old, rerouted(old, (0, 0, 100)))
    assert drift.judged_share == 100 / T
    assert broken == ["flipped routing reaches 61% of the probe (allowed: 25%)"]


def test_routing_is_compared_in_the_layers_that_both_models_have():
    before, after = probe_output(layers=2), probe_output(layers=3)
    after.expert_ids_BLTC[:, [0, 2]] = before.expert_ids_BLTC
    assert drift_and_broken_limits(before, after, [0, None, 1])[0].flipped == 0
    assert drift_and_broken_limits(before, after, [0, 1, None])[0].flipped > 500


@pytest.mark.parametrize(
    "growth, blocks",
    [
        (Deepen(2), [0, None, 1, None]),
        (Deepen(1, "end"), [0, 1, None]),
        (Deepen(1, "end", "copy"), [0, 1, None]),
        (Widen(2), [0, 1]),
    ],
)
def test_a_plan_tells_which_old_block_each_new_one_is(growth, blocks):
    assert match_plan_blocks(make_plan(MOE, growth)[1]) == blocks


@pytest.mark.parametrize(
    "growth, logit, loss",
    [
        (Upcycle(), 1e-5, 2e-5),
        (Widen(), 1e-5, 2e-5),
        (Deepen(), 1e-5, 2e-5),
        (Deepen(0, init="copy"), 1e-5, 2e-5),
        (Deepen(init="copy"), math.inf, 2.0),
        (Upcycle(reinit_fraction=0.5), math.inf, 2.0),
    ],
)
def test_a_tolerance_left_open_is_what_rounding_may_do_where_the_function_is_kept(
    growth, logit, loss
):
    assert growth.is_exact == (loss < 1)
    assert resolve_tolerance(growth, 1e-5) == (logit, loss)
    for own, limits in (
        (Tolerance(max_logit_drift=0.0), (0.0, loss)),
        (Tolerance(max_loss_drift=7.0), (logit, 7.0)),
        (Tolerance(3.0, 4.0), (3.0, 4.0)),
    ):
        assert resolve_tolerance(replace(growth, tolerance=own), 1e-5) == limits


def test_a_flipped_token_is_no_part_of_what_rounding_does():
    """Two nearly equal experts of a random mixture: float32 sends tokens elsewhere, and what that
    moves would hide any fault."""
    exact, rounded = probe_output(), rerouted(probe_output(), (1, 0, 250))
    rounded.hidden_BTD[1, 250:, 3] += 5
    rounded.hidden_BTD[0, 7, 1] += 1e-6
    rounded.margin_BLT[1, 1, 251] += 3
    rounded.margin_BLT[2, 1, 3] += 1e-5
    floor = measure_rounding(rounded, exact)
    assert floor.logit == pytest.approx(1e-6, rel=0.2)
    assert floor.margin == pytest.approx(1e-5, rel=0.01)


def test_a_weight_in_bf16_that_is_only_repeated_may_not_be_off_at_all():
    checker = PlanChecker()

    def inspect(param, row, old, new):
        if param == "blocks.0.moe.up_proj":
            new[1].mul_(1.01)
        checker(param, row, old, new)

    config, plan = make_plan(DENSE, Upcycle(4))
    apply_plan(config, plan, random_state(DENSE, torch.bfloat16), inspect=inspect)
    worst, error, limit = checker.worst()
    assert worst == "blocks.0.moe.up_proj" and error > limit
