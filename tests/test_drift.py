import math
from dataclasses import replace

import pytest
import torch
from small import CONFIGS, DENSE, LEARNED, MOE, trained_like, windows

from config import Deepen, InputError, Upcycle, Widen
from models import SLM
from transfer import State, carry_out, plan_for
from transfer.drift import (
    GrowthError,
    Structure,
    block_map,
    broken_laws,
    compare,
    grow,
    loads,
)
from transfer.view import View, look

V, B, T = 7, 4, 256
EVERY = "logit loss weights"
ONE_LAYER = replace(DENSE, n_layers=1)


def state(config, dtype=torch.double):
    return State.of(trained_like(config).to(dtype))


def view(layers=2, experts=4, top_k=2):
    """A model's view of 1,024 tokens, all logits and losses 1."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(B, layers, T, experts, generator=generator).argsort(-1)[..., :top_k]
    return View(torch.ones(B, T, V), torch.ones(B, T), chosen.sort(-1).values)


def rerouted(old, *tokens):
    """Tokens (window, layer, place) whose first choice is another expert."""
    chosen = old.chosen_BLTC.clone()
    for window, layer, place in tokens:
        chosen[window, layer, place, 0] = 99
    return old._replace(chosen_BLTC=chosen)


def judged(before, after, layers=(0, 1)):
    drift = compare(before, after, list(layers))
    return drift, broken_laws(drift, Widen())


def tampered(config, how, name, tamper):
    """The laws that break where `tamper` has its way with one grown weight."""
    old = state(config)
    new_config, plan = plan_for(config, how)
    structure = Structure()

    def inspect(this, row, source, new):
        if this == name:
            tamper(new)
        structure(this, row, source, new)

    new = carry_out(new_config, plan, old, inspect=inspect)
    views = (look(s.model(), windows(config)) for s in (old, new))
    drift = replace(compare(*views, block_map(plan)), **structure.summary())
    assert structure.worst()[0] == name or "router" in name
    return " ".join(broken_laws(drift, how))


@pytest.mark.parametrize("dtype, tolerance", [(torch.double, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    "config, how",
    [(DENSE, Upcycle(5)), (LEARNED, Widen(3, 0.5)), (MOE, Widen(2, 0.5)), (MOE, Deepen(3))],
)
def test_an_exact_growth_passes_and_is_measured(config, how, dtype, tolerance):
    new, drift = grow(state(config, dtype), how, windows(config))
    assert new.config == plan_for(config, how)[0]
    assert drift.max_logit_diff < tolerance and abs(drift.loss_drift) < tolerance
    assert drift.structure_error < tolerance and abs(drift.kl) < tolerance
    assert drift.loss_after == pytest.approx(drift.loss_before) and drift.probe_tokens == 3 * 13
    assert drift.top1_changed == drift.flipped == 0
    assert (drift.router_std is None) == isinstance(how, Widen)
    assert (drift.twin_distance is None) == isinstance(how, Deepen)
    if new.config.num_experts:
        assert 0 <= drift.load_min <= 1 / new.config.num_experts <= drift.load_max <= 1


@pytest.mark.parametrize("how", [Deepen(2, init="copy"), Upcycle(5, redrawn=0.5)])
def test_a_growth_that_changes_the_function_is_measured_and_held_to_a_limit_of_its_own(how):
    new, drift = grow(state(DENSE), how, windows(DENSE))
    assert new.config == plan_for(DENSE, how)[0] and drift.max_logit_diff > 1e-3
    assert drift.structure_error < 1e-12 and abs(drift.loss_drift) < how.limits.loss == 2
    for name in ("max_logit_drift", "max_loss_drift"):
        with pytest.raises(GrowthError, match=rf"moved by .* \({name}: 0.001\)"):
            grow(state(DENSE), replace(how, **{name: 1e-3}), windows(DENSE))


def test_routing_that_changed_with_the_function_is_no_fault_and_excuses_no_logit():
    _, drift = grow(state(MOE), Deepen(2, "middle", "copy"), windows(MOE))
    assert drift.flipped > 1 and drift.max_logit_diff > 1e-3


@pytest.mark.parametrize("noise, low, high", [(0.0, 0.0, 0.0), (0.1, 0.1, 0.2), (1.0, 1.0, 1.5)])
def test_the_twin_distance_is_about_the_noise_times_root_two(noise, low, high):
    _, drift = grow(state(LEARNED), Widen(2, noise), windows(LEARNED))
    assert low <= drift.twin_distance <= high


@pytest.mark.parametrize(
    "config, how, name, tamper, laws",
    [
        (DENSE, Widen(2), "blocks.1.attn.o_proj.weight", lambda w: w.mul_(1.5), EVERY),
        (DENSE, Widen(2), "norm.weight", lambda w: w.fill_(math.nan), EVERY),
        (DENSE, Widen(2), "embed.weight", lambda w: w[0, 0].fill_(math.inf), EVERY),
        (MOE, Deepen(1), "blocks.2.attn.o_proj.weight", lambda w: w.fill_(0.1), EVERY),
        (DENSE, Upcycle(4), "blocks.0.moe.up_proj", lambda w: w[1].mul_(2), EVERY),
        (MOE, Widen(2), "blocks.0.moe.router.weight", lambda w: w.neg_(), "loss routing weights"),
        (ONE_LAYER, Upcycle(4), "blocks.0.moe.router.weight", torch.zero_, "spread"),
    ],
)
def test_a_weight_that_breaks_the_function_is_named_law_by_law(config, how, name, tamper, laws):
    broken = tampered(config, how, name, tamper)
    assert broken and all(law in broken for law in laws.split())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_growing_a_model_that_holds_a_nan_is_an_error(config):
    old = state(config)
    old.weights["blocks.0.attn.v_proj.weight"][0, 0] = math.nan
    with pytest.raises(GrowthError, match="a logit moved by nan"):
        grow(old, Deepen(1), windows(config))


def test_the_error_says_what_moved_and_how_far_it_may():
    with pytest.raises(GrowthError, match=r"^Widen .* a logit moved by .*max_logit_drift: 0\)"):
        grow(state(DENSE, torch.float32), Widen(2, max_logit_drift=0.0), windows(DENSE))
    with pytest.raises(InputError, match="already has"):
        grow(state(MOE), Upcycle(), windows(MOE))


def test_a_moved_logit_and_a_moved_loss_are_told_apart():
    old = view()
    logits, loss = old.logits_BTV.clone(), old.loss_BT.clone()
    logits[3, 200, 2] -= 0.01
    loss[1, 7] += 1.0
    assert judged(old, old)[1] == []
    assert judged(old, old._replace(logits_BTV=logits))[1] == [
        "a logit moved by 0.01 (max_logit_drift: 0.001)"
    ]
    (broken,) = judged(old, old._replace(loss_BT=loss))[1]
    assert broken.startswith("the loss moved by 0.000977")


@pytest.mark.parametrize("layer", [0, 1])
def test_one_flipped_token_in_a_thousand_excuses_itself_and_what_follows_in_its_window(layer):
    old = view()
    new = rerouted(old, (2, layer, 100))
    logits = new.logits_BTV.clone()
    logits[2, 100:, 3] += 5
    drift, broken = judged(old, new._replace(logits_BTV=logits))
    assert (drift.flipped, drift.max_logit_diff, broken) == (1, 0, [])
    for window, place in [(2, 99), (1, 100), (3, 255)]:
        logits = new.logits_BTV.clone()
        logits[window, place, 3] += 5
        drift, broken = judged(old, new._replace(logits_BTV=logits))
        assert drift.max_logit_diff == 5 and "a logit moved" in broken[0]
    loss = new.loss_BT.clone()
    loss[2, 150] += 1
    assert "the loss moved" in judged(old, new._replace(loss_BT=loss))[1][0]


def test_more_flipped_tokens_than_one_in_a_thousand_are_not_excused():
    old = view()
    assert judged(old, rerouted(old, (0, 0, 9), (0, 1, 9)))[0].flipped == 1, "one token, two layers"
    drift, broken = judged(old, rerouted(old, (0, 0, 9), (3, 1, 9)))
    assert drift.flipped == 2 and "the routing of 2 probe tokens changed" in broken[0]


def test_routing_is_compared_in_the_layers_that_both_models_have():
    before, after = view(layers=2), view(layers=3)
    after.chosen_BLTC[:, [0, 2]] = before.chosen_BLTC
    assert judged(before, after, [0, None, 1])[0].flipped == 0
    assert judged(before, after, [0, 1, None])[0].flipped > 500
    maps = {Deepen(2): [0, None, 1, None], Deepen(1, "end"): [0, 1, None], Widen(2): [0, 1]}
    for how, want in maps.items():
        assert block_map(plan_for(MOE, how)[1]) == want


def test_what_a_model_sees_does_not_depend_on_autocast_or_the_matmul_precision():
    torch.manual_seed(0)
    model, probe = SLM(DENSE), windows(DENSE)
    want, inside = look(model, probe), set()
    precision = torch.get_float32_matmul_precision
    model.embed.register_forward_hook(lambda *_: inside.add(precision()))
    chosen = precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            got = look(model, probe)
        assert inside == {"highest"}
        assert precision() == "medium"
        with pytest.raises(ValueError, match="context"):
            look(model, torch.zeros(1, 99, dtype=torch.long))
        assert precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(chosen)
    assert torch.equal(got.logits_BTV, want.logits_BTV) and torch.equal(got.loss_BT, want.loss_BT)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_view_is_what_the_model_says_of_the_whole_probe_at_once(config):
    model, probe = trained_like(config), windows(config)
    out, seen = model(probe[:, :-1]), look(model, probe)
    torch.testing.assert_close(seen.logits_BTV, out.logits)
    assert seen.chosen_BLTC.shape == (3, len(out.routing), 13, 2 if out.routing else 0)
    for layer, routing in enumerate(out.routing):
        chosen_NC = seen.chosen_BLTC[:, layer].flatten(0, 1)
        assert torch.equal(chosen_NC, routing.chosen_NC.sort(-1).values)
    if out.routing:
        load_LE = loads(seen, config.num_experts)
        torch.testing.assert_close(load_LE, torch.stack([layer.load_E for layer in out.routing]))
        torch.testing.assert_close(load_LE.sum(1), torch.ones(len(load_LE), dtype=torch.double))
