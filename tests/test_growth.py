from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from small import (
    CONFIGS,
    DENSE,
    LEARNED,
    LEARNED_MOE,
    MOE,
    at_rest,
    gradients,
    identical,
    logits,
    retrained,
    tensors,
    trained_like,
    windows,
    with_moments,
)

from config import Deepen, InputError, Upcycle, Where, Widen
from transfer import State, carry_out, deepen, plan_for, upcycle, widen
from transfer.growth import block_origins, copied_blocks
from transfer.plan import Tile, tile

WIDENINGS = [Widen(times, noise) for times in (2, 3) for noise in (0.0, 0.1, 1.0)]
DEEPENINGS = [Deepen(extra, where) for extra in (1, 3) for where in get_args(Where)]
CHAIN = [Widen(2), Deepen(2), Widen(2, 0.0), Deepen(1, "end")]
UPCYCLING = [Widen(3), Upcycle(4), Deepen(2)]
UPCYCLED = [Upcycle(4), Widen(2), Deepen(3), Widen(2, 0.5)]
ANY = [[how] for how in (*WIDENINGS, *DEEPENINGS)] + [CHAIN]
FROM_DENSE = [[Upcycle(4)], [Upcycle(1, 1)], UPCYCLING, UPCYCLED]
GROWTHS = [(name, hows) for name in CONFIGS for hows in ANY]
GROWTHS += [(name, hows) for name in ("dense", "learned", "imported") for hows in FROM_DENSE]
IDS = ["-".join([name, *(type(how).__name__ for how in hows)]) for name, hows in GROWTHS]
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
one_of_each = pytest.mark.parametrize(
    "config, how",
    [
        (DENSE, Upcycle(4)),
        (DENSE, Upcycle(1, 1)),
        (DENSE, Widen(2)),
        (LEARNED_MOE, Widen(3)),
        (MOE, Deepen(2)),
    ],
)


def grown(old, how, **options):
    config, plan = plan_for(old.config, how)
    return plan, carry_out(config, plan, old, **options)


def fold(new, row, old):
    """The chain rule: the old weight's slope is the sum of its copies', times their scale."""
    for dim, times in enumerate(row.copies):
        new = new.unflatten(dim, (times, -1)).sum(dim)
    return row.scale * new.view_as(old)


def assert_function_is_kept(old, new):
    torch.testing.assert_close(logits(new), logits(old), rtol=0, atol=1e-10)


def assert_gradients_fold_back(old, plan, new):
    slopes = gradients(new)
    for name, row in plan.items():
        if isinstance(row, Tile):
            want = old.adam[row.source]["exp_avg"]
            torch.testing.assert_close(fold(slopes[name], row, want), want, rtol=1e-9, atol=1e-12)


def assert_moments_are_shares(old, plan, new):
    """Equal shares that fold back to the old moment; the square of a share is the share squared."""
    assert new.adam.keys() == {n for n, row in plan.items() if isinstance(row, Tile)}
    for name, after in new.adam.items():
        row, before = plan[name], old.adam[plan[name].source]
        assert after["step"] == before["step"]
        slope = fold(after["exp_avg"], row, before["exp_avg"])
        torch.testing.assert_close(slope, before["exp_avg"])
        torch.testing.assert_close(after["exp_avg_sq"], after["exp_avg"].square())


@pytest.mark.parametrize("name, hows", GROWTHS, ids=IDS)
def test_growth_keeps_the_function_and_gradients_and_moments_add_up(name, hows):
    old = at_rest(CONFIGS[name])
    for how in hows:
        plan, new = grown(old, how)
        sources = sorted(row.source for row in plan.values() if isinstance(row, Tile))
        assert sources == sorted(old.weights), "each old weight goes on, once"
        assert_function_is_kept(old, new)
        assert_gradients_fold_back(old, plan, new)
        assert_moments_are_shares(old, plan, new)
        old = with_moments(retrained(new))


@pytest.mark.parametrize("hows", [CHAIN, UPCYCLING, UPCYCLED])
def test_growths_follow_one_another_without_training_between(hows):
    first = last = State.of(trained_like(DENSE))
    for how in hows:
        _, last = grown(last, how)
    assert_function_is_kept(first, last)


@every_config
@pytest.mark.parametrize("how", [Widen(2, 0.0), Widen(3, 0.0), Deepen(2), Deepen(1, "end")])
def test_without_noise_moments_become_what_the_bigger_model_would_have_seen(config, how):
    _, new = grown(at_rest(config), how)
    seen = with_moments(new).adam
    for name, moments in new.adam.items():
        for what, value in moments.items():
            torch.testing.assert_close(value, seen[name][what], rtol=1e-9, atol=1e-14)


@one_of_each
def test_the_old_model_is_left_as_it_was_and_shares_no_memory(config, how):
    old = at_rest(config)
    before = deepcopy(old)
    for tensor in tensors(grown(old, how)[1]).values():
        tensor.fill_(torch.nan)
    assert identical(old, before)


@one_of_each
def test_consuming_the_old_state_empties_it_and_gives_the_same_new_one(config, how):
    old = at_rest(config)
    _, new = grown(old, how)
    _, again = grown(old, how, consume=True)
    assert not old.weights and not old.adam and identical(new, again)


@one_of_each
def test_how_the_old_weights_lie_in_memory_changes_nothing(config, how):
    old = at_rest(config)
    _, new = grown(old, how)
    for weights in (old.weights, *old.adam.values()):
        weights |= {
            name: weight.mT.contiguous().mT for name, weight in weights.items() if weight.dim() > 1
        }
    _, again = grown(old, how)
    assert identical(new, again)


@one_of_each
def test_the_seed_decides_what_is_drawn(config, how):
    old = State.of(trained_like(config))
    first, again, other = (grown(old, how, seed=seed)[1] for seed in (3, 3, 4))
    assert identical(first, again) and not identical(first, other)


@one_of_each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.double])
def test_growth_keeps_the_precision_of_the_weights(config, how, dtype):
    old = State.of(trained_like(config).to(dtype))
    assert {weight.dtype for weight in grown(old, how)[1].weights.values()} == {dtype}


@pytest.mark.parametrize("noise", [0.1, 1.0])
@pytest.mark.parametrize("times", [2, 3])
def test_noise_cancels_over_the_copied_inputs_and_is_as_large_as_stated(times, noise):
    old = torch.randn(120, 80, generator=torch.Generator().manual_seed(0)).double() + 0.5
    row = tile("blocks.0.attn.q_proj.weight", noise=noise, embed=times, heads=times)
    exact = old.tile(times, times) / times
    added = row.weight(old, torch.Generator()) - exact
    assert added.unflatten(-1, (times, -1)).sum(-2).abs().max() < 1e-12
    assert (added.std() / exact.std()).item() == pytest.approx(noise, rel=0.03)
    one, other, *_ = added.unflatten(0, (times, -1)).flatten(1)
    assert F.cosine_similarity(one, other, dim=0).abs() < 0.05, "output copies differ in noise"


def test_copies_are_equal_without_noise_and_apart_with_it():
    for noise in (0.0, 0.1):
        plan, new = grown(State.of(trained_like(DENSE)), Widen(2, noise))
        for name, row in plan.items():
            first, *others = row.outputs_of(new.weights[name])
            if row.summed and others:
                assert torch.equal(first, others[0]) == (noise == 0), name


@pytest.mark.parametrize("how", [*DEEPENINGS, Deepen(0)])
@every_config
def test_new_blocks_hand_the_residual_stream_on_bit_for_bit(config, how):
    old = State.of(trained_like(config).float())
    assert torch.equal(logits(grown(old, how)[1]), logits(old))


def test_new_blocks_lie_after_even_runs_of_old_ones_or_in_the_middle_or_at_the_end():
    places = {
        (12, Deepen(3)): "0 1 2 3 - 4 5 6 7 - 8 9 10 11 -",
        (12, Deepen(3, "end")): "0 1 2 3 4 5 6 7 8 9 10 11 - - -",
        (12, Deepen(3, "middle")): "0 1 2 3 4 5 - - - 6 7 8 9 10 11",
        (1, Deepen(2, "middle")): "0 - -",
        (5, Deepen(2)): "0 1 2 - 3 4 -",
        (2, Deepen(4)): "0 - - 1 - -",
        (2, Deepen(0)): "0 1",
    }
    for (layers, how), want in places.items():
        got = ["-" if old is None else str(old) for old in block_origins(layers, how)]
        assert " ".join(got) == want


def test_a_run_of_copied_blocks_repeats_the_old_ones_before_it_in_order():
    places = {
        (4, Deepen(4, "end")): "0 1 2 3 0 1 2 3",
        (4, Deepen(2, "middle")): "0 1 0 1 2 3",
        (4, Deepen(2)): "0 1 1 2 3 3",
        (2, Deepen(5, "end")): "0 1 0 1 0 1 0",
        (2, Deepen(4)): "0 0 0 1 1 1",
    }
    for (layers, how), want in places.items():
        assert " ".join(map(str, copied_blocks(block_origins(layers, how)))) == want


@every_config
@pytest.mark.parametrize("consume", [False, True])
def test_a_copied_block_is_its_original_and_adam_is_new_to_it(config, consume):
    old = at_rest(config)
    before = deepcopy(old)
    plan, new = grown(old, Deepen(2, "end", "copy"), consume=consume)
    for name, row in plan.items():
        assert torch.equal(new.weights[name], before.weights[row.source])
        assert (name in new.adam) == ("blocks.2" not in name and "blocks.3" not in name)
    assert (logits(new) - logits(before)).abs().max() > 1e-3


@pytest.mark.parametrize("config", [DENSE, LEARNED])
def test_redrawing_takes_its_share_of_each_expert_and_leaves_the_rest(config):
    old = at_rest(replace(config, d_ff=64))
    _, new = grown(old, Upcycle(4, redrawn=0.5))
    for layer in range(2):
        kept = []
        for kind in ("gate_proj", "up_proj", "down_proj"):
            dense = old.weights[f"blocks.{layer}.mlp.{kind}.weight"]
            experts = new.weights[f"blocks.{layer}.moe.{kind}"]
            same = experts == dense
            kept.append(same.transpose(1, 2).all(-1) if kind == "down_proj" else same.all(-1))
            assert (~same).float().mean() == 0.5
            was, now = dense.expand_as(experts)[~same], experts[~same]
            assert now.mean().item() == pytest.approx(was.mean().item(), abs=0.02)
            assert now.std().item() == pytest.approx(was.std().item(), rel=0.1)
        assert all(torch.equal(kept[0], each) for each in kept), "the same in each projection"
        assert (kept[0].sum(-1) == 32).all() and len(kept[0].unique(dim=0)) == 4
    assert new.adam.keys() == grown(old, Upcycle(4))[1].adam.keys()


def test_the_routers_scale_multiplies_what_it_would_have_been():
    old, name = State.of(trained_like(DENSE)), "blocks.0.moe.router.weight"
    one, three = (grown(old, Upcycle(4, router_scale=s))[1].weights[name] for s in (1.0, 3.0))
    torch.testing.assert_close(three, 3 * one)


@every_config
def test_widening_divides_the_logit_scale_only_where_the_head_is_tied(config):
    new, _ = plan_for(replace(config, logit_scale=0.6), Widen(3))
    assert new.logit_scale == pytest.approx(0.2 if config.tied else 0.6)
    assert new.head_size == config.head_size
    assert new.n_heads * config.kv_heads == config.n_heads * new.kv_heads, "same groups"


def test_the_operators_on_models_keep_the_logits_and_the_original():
    model, tokens = trained_like(DENSE), windows(DENSE)[:, :-1]
    models = [model, widen(model), deepen(model), upcycle(model), widen(upcycle(model, 3), 3, 1.0)]
    for one, other in pairwise(m(tokens).logits for m in models):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert [m.config.num_experts for m in models] == [0, 0, 0, 8, 3]
    assert identical(State.of(model), State.of(trained_like(DENSE)))


def test_what_has_experts_is_not_upcycled_again():
    with pytest.raises(InputError, match="already has 5 experts"):
        plan_for(MOE, Upcycle(4))


def test_a_parameter_without_a_row_and_one_of_the_wrong_shape_are_named():
    old, name = State.of(trained_like(DENSE)), "blocks.1.mlp.up_proj.weight"
    config, plan = plan_for(DENSE, Widen(2))
    with pytest.raises(KeyError, match=name):
        carry_out(config, {n: row for n, row in plan.items() if n != name}, old)
    with pytest.raises(ValueError, match=rf"{name} came out as \(20, 24\), not \(20, 48\)"):
        carry_out(config, plan | {name: plan[name]._replace(copies=(2, 1))}, old)


# The laws above have teeth: what breaks one is caught by it.
caught = pytest.raises(AssertionError, match="not close")


def test_a_forgotten_scale_is_caught():
    old, name = at_rest(DENSE), "blocks.1.attn.k_proj.weight"
    config, plan = plan_for(DENSE, Widen(2))
    plan[name] = plan[name]._replace(summed=False)
    new = carry_out(config, plan, old)
    with caught:
        assert_function_is_kept(old, new)
    with caught:
        assert_gradients_fold_back(old, plan, new)


def test_a_second_moment_whose_share_is_not_squared_is_caught():
    old = at_rest(DENSE)
    plan, new = grown(old, Widen(2))
    new.adam["embed.weight"]["exp_avg_sq"] *= 2
    with caught:
        assert_moments_are_shares(old, plan, new)


def test_a_projection_that_is_tiled_packed_with_another_is_caught():
    old = at_rest(DENSE)
    plan, new = grown(old, Widen(2, noise=0.0))
    names = [f"blocks.0.mlp.{kind}_proj.weight" for kind in ("gate", "up")]
    packed = torch.cat([old.weights[name] for name in names]).tile(2, 2) / 2
    new.weights |= dict(zip(names, packed.chunk(2), strict=True))
    with caught:
        assert_function_is_kept(old, new)
    with caught:
        assert_gradients_fold_back(old, plan, new)


def test_noise_that_does_not_cancel_is_caught():
    old = at_rest(MOE)
    _, new = grown(old, Widen(2))
    weight = new.weights["blocks.0.moe.up_proj"]
    weight += 1e-4 * torch.randn_like(weight)
    with caught:
        assert_function_is_kept(old, new)


def test_gates_that_do_not_sum_to_one_are_caught():
    def over_all(router, x, out):
        gates = F.linear(x[0], router.weight).softmax(-1).gather(1, out[1].chosen_NC)
        return gates, out[1]

    old = at_rest(DENSE)
    model = grown(old, Upcycle(4))[1].model()
    for block in model.blocks:
        block.moe.router.register_forward_hook(over_all)
    with caught:
        torch.testing.assert_close(model(windows(DENSE)[:, :-1]).logits, logits(old))
