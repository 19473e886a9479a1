from dataclasses import replace

import pytest
import torch

from config import Deepen, Upcycle, Widen
from models import SLM
from tests.helpers.growth_laws import grow_by
from tests.helpers.small_models import DENSE, MOE, perturbed, random_model, windows
from transfer import TrainState
from utils.metrics.diagnostics import (
    copied_matrices,
    routing_stats,
    underused_experts,
    weight_stats,
)


def grown_state(*growths):
    return grow_by(TrainState.from_model(random_model(DENSE)), *growths)


@pytest.mark.parametrize("noise, low, high", [(0.0, 0.0, 0.0), (0.1, 0.1, 0.2)])
@pytest.mark.parametrize("later", [(), (Upcycle(4),), (Deepen(2),), (Deepen(1, "end", "copy"),)])
def test_copies_are_matched_whatever_has_grown_since(later, noise, low, high):
    growths = (Widen(2, noise), *later)
    stats = weight_stats(copied_matrices(DENSE, growths), grown_state(*growths).weights)
    assert low <= stats["copy_distance"] <= high


def test_the_distances_are_means_over_matrices():
    growths = Widen(2), Upcycle(4)
    state, rows = perturbed(grown_state(*growths)), copied_matrices(DENSE, growths)
    each = [weight_stats({name: rows[name]}, {name: state.weights[name]}) for name in rows]
    stats = weight_stats(rows, state.weights)
    for kind in ("copy_distance", "expert_distance"):
        values = [one[kind] for one in each if kind in one]
        assert len({round(value, 6) for value in values}) == len(values) > 5, "none is like another"
        assert stats[kind] == pytest.approx(sum(values) / len(values))


def test_only_the_last_widening_makes_copies_and_new_blocks_have_none():
    rows = copied_matrices(DENSE, [Deepen(1, "end"), Widen(3), Deepen(1, "end"), Upcycle(4)])
    assert {name.split(".")[1] for name in rows if name.startswith("blocks")} == {"0", "1", "2"}
    assert rows["blocks.0.moe.up_proj"].repeats == (1, 3, 3)
    assert not copied_matrices(DENSE, [Deepen(1), Upcycle(4), Widen(1)])
    assert "copy_distance" not in weight_stats({}, grown_state().weights)


def test_experts_diverge_from_nothing_to_root_two():
    state = grown_state(Upcycle(4))
    assert weight_stats({}, state.weights)["expert_distance"] < 1e-7
    unrelated = {name: torch.randn_like(weight) for name, weight in state.weights.items()}
    assert weight_stats({}, unrelated)["expert_distance"] == pytest.approx(2**0.5, rel=0.02)
    pair = {"blocks.0.moe.up_proj": torch.stack([torch.eye(3), 2 * torch.eye(3)])}
    expected = 1 / 2.5**0.5  # their distance over the root mean square of their norms
    assert weight_stats({}, pair)["expert_distance"] == pytest.approx(expected)


def test_a_router_without_a_preference_has_the_largest_entropy_and_no_margin():
    model = SLM(MOE)
    for block in model.blocks:
        block.moe.router.weight.data.zero_()
    with torch.no_grad():
        entropy, margin = routing_stats(model(windows(MOE)[:, :-1]).routing).tolist()
    assert (entropy, margin) == (pytest.approx(torch.tensor(5.0).log().item()), 0)


def test_the_margin_is_that_of_the_last_chosen_expert_over_the_first_left_out():
    tokens = windows(MOE)[:, :-1]
    with torch.no_grad():
        two_chosen = random_model(MOE)(tokens).routing
        all_chosen = random_model(replace(MOE, top_k=5))(tokens).routing
    ranked = [layer.logits_NE.sort(-1, descending=True).values for layer in two_chosen]
    margins = torch.stack([(logits[:, 1] - logits[:, 2]).mean() for logits in ranked])
    assert routing_stats(two_chosen)[1].item() == pytest.approx(margins.mean().item())
    assert margins.mean() > 0
    assert routing_stats(all_chosen)[1] == 0


def test_an_expert_is_underused_below_a_tenth_of_its_fair_share():
    load = [[0.5, 0.475, 0.0251, 0.0], [0.25] * 4, [0.9, 0.1, 0.024, 0.025]]
    assert underused_experts(load) == [(0, 3), (2, 2)]
    assert underused_experts([]) == []
