"""A model that reads on from a cache says what it would say of the whole text."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from small import CONFIGS, DENSE, MOE, trained_like, windows

from models import Cache

ONE_KEY = replace(MOE, n_kv_heads=1, tied=False, logit_scale=0.5)
every_model = pytest.mark.parametrize(
    "config", [*CONFIGS.values(), ONE_KEY], ids=[*CONFIGS, "one-key"]
)
exactly = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def cache_for(model, rows, slots=None):
    config = model.config
    return Cache(config, rows, slots or config.seq_len, like=model.norm.weight)


@every_model
@pytest.mark.parametrize("sizes", [[1] * 13, [13], [5, 1, 4, 3]])
@torch.no_grad()
def test_reading_in_pieces_gives_the_logits_of_the_whole(config, sizes):
    model, tokens = trained_like(config), windows(config)[:, :-1]
    whole, cache = model(tokens), cache_for(model, len(tokens))
    outs = [model(piece, cache) for piece in tokens.split(sizes, 1)]
    exactly(torch.cat([out.logits for out in outs], 1), whole.logits)
    for layer, routing in enumerate(whole.routing):
        chosen = [out.routing[layer].chosen_NC.view(len(tokens), -1, config.top_k) for out in outs]
        assert torch.equal(torch.cat(chosen, 1).flatten(0, 1), routing.chosen_NC)


@every_model
@torch.no_grad()
def test_texts_of_different_length_are_read_together_and_some_dropped(config):
    model, tokens = trained_like(config), windows(config)[:, :-1]
    whole, cache = model(tokens).logits, cache_for(model, 3, slots=10)
    begun = [2, 6, 4]
    padded = tokens[:, :6].clone()
    padded[0, 2:], padded[2, 4:] = 7, 8
    logits = model(padded, cache).logits
    cache.lengths = begun
    for row, length in enumerate(begun):
        exactly(logits[row, :length], whole[row, :length])
    for step in range(3):
        if step == 1:
            cache.keep([0, 2])
            tokens, whole, begun = tokens[[0, 2]], whole[[0, 2]], [2, 4]
        place = torch.tensor(begun)[:, None] + step
        got = model(tokens.gather(1, place), cache).logits[:, 0]
        exactly(got, whole[range(len(place)), place[:, 0]])
    assert cache.lengths == [5, 7]


@torch.no_grad()
def test_lowering_the_length_forgets_the_last_tokens():
    model, tokens = trained_like(DENSE), windows(DENSE)[:, :-1]
    cache = cache_for(model, 3)
    model(tokens.flip(1)[:, :9], cache)
    cache.lengths = [0, 0, 0]
    exactly(model(tokens, cache).logits, model(tokens).logits)


@torch.no_grad()
def test_the_logits_of_one_place_in_each_row_are_those_among_all():
    out = trained_like(DENSE)(windows(DENSE)[:, :-1])
    exactly(out.logits_at([3, 0, 12]), out.logits[range(3), [3, 0, 12]])


@torch.no_grad()
def test_under_autocast_the_cache_changes_no_more_than_rounding():
    model, tokens = trained_like(DENSE).float(), windows(DENSE)[:, :-1]
    with torch.autocast("cpu", torch.bfloat16):
        cache = cache_for(model, 3)
        got = torch.cat([model(piece, cache).logits for piece in tokens.split(4, 1)], 1)
        torch.testing.assert_close(got, model(tokens).logits, rtol=0.1, atol=0.1)


@torch.no_grad()
def test_what_does_not_fit_the_cache_or_the_context_is_refused():
    model, tokens = trained_like(DENSE), windows(DENSE)
    with pytest.raises(ValueError, match="6 tokens do not fit a cache of 5"):
        model(tokens[:, :6], cache_for(model, 3, slots=5))
    cache = cache_for(model, 3, slots=99)
    model(tokens[:, :10], cache)
    with pytest.raises(ValueError, match="14 tokens do not fit a context of 13"):
        model(tokens[:, 10:], cache)
    assert cache.lengths == [10] * 3
