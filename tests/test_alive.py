from dataclasses import replace

import pytest
import torch
from small import DENSE, MOE, retrained, trained_like, windows

from config import Deepen, Upcycle, Widen
from models import SLM
from transfer import State, carry_out, plan_for
from utils.alive import routing_alive, starving, twin_rows, weights_alive


def grown(config, *hows):
    state = State.of(trained_like(config))
    for how in hows:
        state = carry_out(*plan_for(state.config, how), state)
    return state


@pytest.mark.parametrize("noise, low, high", [(0.0, 0.0, 0.0), (0.1, 0.1, 0.2)])
@pytest.mark.parametrize("later", [(), (Upcycle(4),), (Deepen(2),), (Deepen(1, "end", "copy"),)])
def test_twins_are_found_again_whatever_has_grown_since(later, noise, low, high):
    growth = (Widen(2, noise), *later)
    found = weights_alive(twin_rows(DENSE, growth), grown(DENSE, *growth).weights)
    assert low <= found["twin_distance"] <= high


def test_the_distances_are_means_over_matrices():
    """As of each alone, none of which is like another."""
    state = retrained(grown(DENSE, Widen(2), Upcycle(4)))
    rows = twin_rows(DENSE, (Widen(2), Upcycle(4)))
    alone = [
        weights_alive({name: row} if name in rows else {}, {name: state.weights[name]})
        for name, row in rows.items()
    ]
    found = weights_alive(rows, state.weights)
    for what in ("twin_distance", "expert_divergence"):
        each = [one[what] for one in alone if what in one]
        assert len({round(one, 6) for one in each}) == len(each) > 5
        assert found[what] == pytest.approx(sum(each) / len(each))


def test_only_the_last_widening_has_twins_and_new_blocks_have_none():
    rows = twin_rows(DENSE, [Deepen(1, "end"), Widen(3), Deepen(1, "end"), Upcycle(4)])
    assert {name.split(".")[1] for name in rows if name.startswith("blocks")} == {"0", "1", "2"}
    assert rows["blocks.0.moe.up_proj"].copies == (1, 3, 3)
    assert not twin_rows(DENSE, [Deepen(1), Upcycle(4), Widen(1)])
    assert "twin_distance" not in weights_alive({}, grown(DENSE).weights)


def test_experts_diverge_from_nothing_to_root_two():
    state = grown(DENSE, Upcycle(4))
    assert weights_alive({}, state.weights)["expert_divergence"] < 1e-7
    alien = {name: torch.randn_like(weight) for name, weight in state.weights.items()}
    assert weights_alive({}, alien)["expert_divergence"] == pytest.approx(2**0.5, rel=0.02)
    one = {"blocks.0.moe.up_proj": torch.stack([torch.eye(3), 2 * torch.eye(3)])}
    want = 1 / 2.5**0.5  # their distance over the root mean square of their norms
    assert weights_alive({}, one)["expert_divergence"] == pytest.approx(want)


def test_a_router_without_a_preference_has_the_largest_entropy_and_no_margin():
    model = SLM(MOE)
    for block in model.blocks:
        block.moe.router.weight.data.zero_()
    with torch.no_grad():
        entropy, margin = routing_alive(model(windows(MOE)[:, :-1]).routing).tolist()
    assert (entropy, margin) == (pytest.approx(torch.tensor(5.0).log().item()), 0)


def test_the_margin_is_of_the_last_chosen_over_the_first_left_out():
    with torch.no_grad():
        layers = trained_like(MOE)(windows(MOE)[:, :-1]).routing
        every = trained_like(replace(MOE, top_k=5))(windows(MOE)[:, :-1]).routing
    ranked = [layer.logits_NE.sort(-1, descending=True).values for layer in layers]
    want = torch.stack([(top[:, 1] - top[:, 2]).mean() for top in ranked]).mean().item()
    assert routing_alive(layers)[1].item() == pytest.approx(want) and want > 0
    assert routing_alive(every)[1] == 0


def test_an_expert_starves_below_a_tenth_of_its_fair_share():
    assert starving([[0.5, 0.475, 0.0251, 0.0], [0.25] * 4, [0.9, 0.1, 0.024, 0.025]]) == [
        (0, 3),
        (2, 2),
    ]
    assert starving([]) == []
