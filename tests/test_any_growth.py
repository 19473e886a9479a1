"""Any start, any order, any factor: growth keeps the function, and Adam's moments are its image."""

from dataclasses import replace

import torch
from hypothesis import assume, given, note, settings
from hypothesis import strategies as st
from small import gradients, logits, retrained, with_moments

from config import Deepen, ModelConfig, Upcycle, Widen
from models import SLM
from transfer import State, carry_out, plan_for
from transfer.plan import Tile

TOLERANCE = 1e-9
MOST_PARAMETERS = 60_000
counts = st.integers(1, 3)


@st.composite
def configs(draw):
    """Small and odd: no size is a power of two unless it happens to be."""
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
        top_k=draw(st.integers(1, experts or 2)),
        position=draw(st.sampled_from(["rope", "learned"])),
        tied=draw(st.booleans()),
        logit_scale=draw(st.sampled_from([1.0, 0.3])),
    )


widenings = st.builds(Widen, st.integers(1, 4), st.sampled_from([0.0, 0.1, 1.0]))
deepenings = st.builds(Deepen, counts, st.sampled_from(["interleaved", "middle", "end"]))
upcyclings = st.builds(Upcycle, st.integers(2, 5), st.integers(1, 2), st.sampled_from([1.0, 4.0]))


@st.composite
def chains(draw):
    """A configuration and one to four growths that fit it, one after another."""
    first = config = draw(configs())
    chain = []
    for _ in range(draw(st.integers(1, 4))):
        kinds = [widenings, deepenings] + ([] if config.num_experts else [upcyclings])
        how = draw(st.one_of(kinds))
        bigger = plan_for(config, how)[0]
        if bigger.num_params <= MOST_PARAMETERS:
            chain.append(how)
            config = bigger
    assume(chain)
    return first, chain


def start(config):
    torch.manual_seed(0)
    return retrained(State.of(SLM(config).double()))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(chains())
def test_a_chain_of_growths_keeps_the_function(drawn):
    config, chain = drawn
    note(f"{config}: {chain}")
    old = new = start(config)
    for how in chain:
        new = carry_out(*plan_for(new.config, how), new)
    torch.testing.assert_close(logits(new), logits(old), rtol=0, atol=TOLERANCE)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(chains())
def test_moments_become_the_image_of_moments(drawn):
    """What a bigger model without noise, in which all experts see all tokens alike, would have
    seen: Adam's moments of one gradient are that gradient and its square."""
    config, chain = drawn
    state = with_moments(start(config))
    for how in chain:
        how = replace(how, noise=0.0) if isinstance(how, Widen) else how
        how = replace(how, top_k=how.num_experts) if isinstance(how, Upcycle) else how
        bigger, plan = plan_for(state.config, how)
        new = carry_out(bigger, plan, state)
        if isinstance(how, Upcycle):
            new.weights |= {n: torch.zeros_like(w) for n, w in new.weights.items() if "router" in n}
        slopes = gradients(new)
        assert new.adam.keys() == {name for name, row in plan.items() if isinstance(row, Tile)}
        for name, kept in new.adam.items():
            assert kept["step"] == state.adam[plan[name].source]["step"]
            torch.testing.assert_close(kept["exp_avg"], slopes[name], rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(
                kept["exp_avg_sq"], slopes[name].square(), rtol=0, atol=TOLERANCE
            )
        state = with_moments(new)
