from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import pytest
import torch

from config import Deepen, Placement, Upcycle, Widen
from tests.helpers.growth_laws import (
    assert_function_is_kept,
    assert_gradients_add_up,
    assert_moments_are_shares,
    grow_by,
    grow_with_plan,
)
from tests.helpers.small_models import (
    CONFIGS,
    DENSE,
    MOE,
    for_each_config,
    is_identical,
    logits,
    perturbed,
    random_model,
    random_train_state,
    windows,
    with_moments,
)
from transfer import TrainState, apply_plan, deepen, make_plan, upcycle, widen
from transfer.growth import copied_blocks, insert_blocks
from transfer.plan import Tile

WIDENINGS = [Widen(times, noise) for times in (2, 3) for noise in (0.0, 0.1, 1.0)]
DEEPENINGS = [Deepen(extra, placement) for extra in (1, 3) for placement in get_args(Placement)]
WIDEN_AND_DEEPEN = [Widen(2), Deepen(2), Widen(2, 0.0), Deepen(1, "end")]
UPCYCLE_SECOND = [Widen(3), Upcycle(4), Deepen(2)]
UPCYCLE_FIRST = [Upcycle(4), Widen(2), Deepen(3), Widen(2, 0.5)]
FOR_ALL = [*([growth] for growth in (*WIDENINGS, *DEEPENINGS)), WIDEN_AND_DEEPEN]
FOR_DENSE = [[Upcycle(4)], [Upcycle(1, 1)], UPCYCLE_SECOND, UPCYCLE_FIRST]
CHAINS = [(name, chain) for name in CONFIGS for chain in FOR_ALL]
CHAINS += [(name, chain) for name in ("dense", "learned", "imported") for chain in FOR_DENSE]
IDS = ["-".join([name, *(type(growth).__name__ for growth in chain)]) for name, chain in CHAINS]


@pytest.mark.parametrize("name, chain", CHAINS, ids=IDS)
def test_growth_keeps_the_function_and_gradients_and_moments_add_up(name, chain):
    old = random_train_state(CONFIGS[name])
    for growth in chain:
        plan, new = grow_with_plan(old, growth)
        sources = sorted(row.source for row in plan.values() if isinstance(row, Tile))
        assert sources == sorted(old.weights), "each old weight goes on, once"
        assert_function_is_kept(old, new)
        assert_gradients_add_up(old, plan, new)
        assert_moments_are_shares(old, plan, new)
        old = with_moments(perturbed(new))


@pytest.mark.parametrize("chain", [WIDEN_AND_DEEPEN, UPCYCLE_SECOND, UPCYCLE_FIRST])
def test_growths_follow_one_another_without_training_between(chain):
    first = TrainState.from_model(random_model(DENSE))
    assert_function_is_kept(first, grow_by(first, *chain))


@for_each_config
@pytest.mark.parametrize("growth", [Widen(2, 0.0), Widen(3, 0.0), Deepen(2), Deepen(1, "end")])
def test_without_noise_moments_become_those_of_the_bigger_models_own_gradient(config, growth):
    _, new = grow_with_plan(random_train_state(config), growth)
    expected = with_moments(new).adam
    for name, moments in new.adam.items():
        for kind, value in moments.items():
            torch.testing.assert_close(value, expected[name][kind], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("growth", [*DEEPENINGS, Deepen(0)])
@for_each_config
def test_new_blocks_pass_the_residual_stream_on_bit_for_bit(config, growth):
    old = TrainState.from_model(random_model(config).float())
    assert torch.equal(logits(grow_by(old, growth)), logits(old))


@pytest.mark.parametrize(
    "n_layers, growth, blocks",
    [
        (12, Deepen(3), "0 1 2 3 - 4 5 6 7 - 8 9 10 11 -"),
        (12, Deepen(3, "end"), "0 1 2 3 4 5 6 7 8 9 10 11 - - -"),
        (12, Deepen(3, "middle"), "0 1 2 3 4 5 - - - 6 7 8 9 10 11"),
        (1, Deepen(2, "middle"), "0 - -"),
        (5, Deepen(2), "0 1 2 - 3 4 -"),
        (2, Deepen(4), "0 - - 1 - -"),
        (2, Deepen(0), "0 1"),
    ],
)
def test_new_blocks_follow_even_runs_of_old_ones_or_lie_in_the_middle_or_at_the_end(
    n_layers, growth, blocks
):
    result = ["-" if old is None else str(old) for old in insert_blocks(n_layers, growth)]
    assert " ".join(result) == blocks


@pytest.mark.parametrize(
    "n_layers, growth, sources",
    [
        (4, Deepen(4, "end"), [0, 1, 2, 3, 0, 1, 2, 3]),
        (4, Deepen(2, "middle"), [0, 1, 0, 1, 2, 3]),
        (4, Deepen(2), [0, 1, 1, 2, 3, 3]),
        (2, Deepen(5, "end"), [0, 1, 0, 1, 0, 1, 0]),
        (2, Deepen(4), [0, 0, 0, 1, 1, 1]),
    ],
)
def test_a_run_of_copied_blocks_repeats_the_old_ones_before_it_in_order(n_layers, growth, sources):
    assert copied_blocks(insert_blocks(n_layers, growth)) == sources


@for_each_config
@pytest.mark.parametrize("consume", [False, True])
def test_a_copied_block_is_its_original_and_adam_starts_afresh_in_it(config, consume):
    old = random_train_state(config)
    before = deepcopy(old)
    plan, new = grow_with_plan(old, Deepen(2, "end", "copy"), consume=consume)
    for name, row in plan.items():
        assert torch.equal(new.weights[name], before.weights[row.source])
        assert (name in new.adam) == (not name.startswith(("blocks.2.", "blocks.3.")))
    assert (logits(new) - logits(before)).abs().max() > 1e-3


@for_each_config
def test_widening_divides_the_logit_scale_only_where_the_head_is_tied(config):
    new, _ = make_plan(replace(config, logit_scale=0.6), Widen(3))
    assert new.logit_scale == pytest.approx(0.2 if config.tie_embeddings else 0.6)
    assert new.head_size == config.head_size
    assert new.n_heads * config.kv_heads == config.n_heads * new.kv_heads, "same groups"


def test_the_operators_on_models_keep_the_logits_and_the_original():
    model, tokens = random_model(DENSE), windows(DENSE)[:, :-1]
    models = [model, widen(model), deepen(model), upcycle(model), widen(upcycle(model, 3), 3, 1.0)]
    for one, other in pairwise(m(tokens).logits for m in models):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert [m.config.num_experts for m in models] == [0, 0, 0, 8, 3]
    assert is_identical(TrainState.from_model(model), TrainState.from_model(random_model(DENSE)))


# The laws above have teeth: each of these breaks one, and is caught by it.
is_caught = pytest.raises(AssertionError, match="not close")


def test_a_forgotten_scale_is_caught():
    old, name = random_train_state(DENSE), "blocks.1.attn.k_proj.weight"
    config, plan = make_plan(DENSE, Widen(2))
    plan[name] = plan[name]._replace(has_input_axis=False)
    new = apply_plan(config, plan, old)
    with is_caught:
        assert_function_is_kept(old, new)
    with is_caught:
        assert_gradients_add_up(old, plan, new)


def test_a_second_moment_whose_share_is_not_squared_is_caught():
    old = random_train_state(DENSE)
    plan, new = grow_with_plan(old, Widen(2))
    new.adam["embed.weight"]["exp_avg_sq"] *= 2
    with is_caught:
        assert_moments_are_shares(old, plan, new)


def test_a_projection_that_is_tiled_packed_with_another_is_caught():
    old = random_train_state(DENSE)
    plan, new = grow_with_plan(old, Widen(2, noise=0.0))
    names = [f"blocks.0.mlp.{kind}_proj.weight" for kind in ("gate", "up")]
    packed = torch.cat([old.weights[name] for name in names]).tile(2, 2) / 2
    new.weights |= dict(zip(names, packed.chunk(2), strict=True))
    with is_caught:
        assert_function_is_kept(old, new)
    with is_caught:
        assert_gradients_add_up(old, plan, new)


def test_noise_that_does_not_cancel_is_caught():
    old = random_train_state(MOE)
    _, new = grow_with_plan(old, Widen(2))
    weight = new.weights["blocks.0.moe.up_proj"]
    weight += 1e-4 * torch.randn_like(weight)
    with is_caught:
        assert_function_is_kept(old, new)
