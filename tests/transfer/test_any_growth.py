"""Growth keeps the function whatever the start, the order and the factors, and Adam's moments grow
as the gradient does."""

from dataclasses import replace

import torch
from hypothesis import assume, given, note, settings
from hypothesis import strategies as st

from config import Deepen, ModelConfig, Upcycle, Widen
from models import SLM
from tests.helpers.growth_laws import assert_function_is_kept, grow_by, grow_with_plan
from tests.helpers.small_models import gradients, perturbed, with_moments
from transfer import TrainState, make_plan
from transfer.plan import Tile

TOLERANCE = 1e-9
MAX_PARAMS = 60_000
counts = st.integers(1, 3)


@st.composite
def configs(draw):
    """Draws small, odd shapes: no size is a power of two unless it happens to be."""
    kv_heads, groups, pairs = draw(counts), draw(counts), draw(st.integers(1, 2))
    heads = kv_heads * groups
    experts = draw(st.sampled_from([0, 0, 3, 5]))
    return ModelConfig(
        vocab_size=draw(st.integers(5, 23)),
        d_model=2 * pairs * heads,
        n_layers=draw(counts),
        n_heads=heads,
        n_kv_heads=kv_heads,
        d_ff=draw(st.integers(1, 9)),
        seq_len=draw(st.integers(1, 7)),
        num_experts=experts,
        top_k=draw(st.integers(2, experts or 2)),
        position_embedding=draw(st.sampled_from(["rope", "learned"])),
        tie_embeddings=draw(st.booleans()),
        logit_scale=draw(st.sampled_from([1.0, 0.3])),
    )


widenings = st.builds(Widen, st.integers(1, 4), st.sampled_from([0.0, 0.1, 1.0]))
deepenings = st.builds(Deepen, counts, st.sampled_from(["interleaved", "middle", "end"]))
upcyclings = st.builds(Upcycle, st.integers(3, 5), st.integers(2, 3), st.sampled_from([1.0, 4.0]))


@st.composite
def chains(draw):
    """Draws a configuration and one to four growths that apply to it one after another."""
    first = config = draw(configs())
    chain = []
    for _ in range(draw(st.integers(1, 4))):
        operators = [widenings, deepenings] + ([] if config.num_experts else [upcyclings])
        growth = draw(st.one_of(operators))
        bigger = make_plan(config, growth)[0]
        if bigger.num_params <= MAX_PARAMS:
            chain.append(growth)
            config = bigger
    assume(chain)
    return first, chain


def random_state(config):
    torch.manual_seed(0)
    return perturbed(TrainState.from_model(SLM(config).double()))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(chains())
def test_a_chain_of_growths_keeps_the_function(case):
    config, chain = case
    note(f"{config}: {chain}")
    old = random_state(config)
    assert_function_is_kept(old, grow_by(old, *chain), TOLERANCE)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(chains())
def test_moments_become_those_that_the_bigger_model_would_have_had(case):
    """Without noise, and where all experts see all tokens alike, Adam's moments of one gradient
    become the bigger model's own gradient and its square."""
    config, chain = case
    state = with_moments(random_state(config))
    for growth in chain:
        if isinstance(growth, Widen):
            growth = replace(growth, noise=0.0)
        if isinstance(growth, Upcycle):
            growth = replace(growth, top_k=growth.num_experts)
        plan, new = grow_with_plan(state, growth)
        if isinstance(growth, Upcycle):
            new.weights |= {n: torch.zeros_like(w) for n, w in new.weights.items() if "router" in n}
        grads = gradients(new)
        assert new.adam.keys() == {name for name, row in plan.items() if isinstance(row, Tile)}
        for name, moments in new.adam.items():
            assert moments["step"] == state.adam[plan[name].source]["step"]
            result = moments["exp_avg"], moments["exp_avg_sq"]
            expected = grads[name], grads[name].square()
            torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCE)
        state = with_moments(new)
