"""A model that reads on from a cache computes what it would of the whole text."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from models import KVCache
from tests.helpers.small_models import CONFIGS, DENSE, MOE, random_model, windows

ONE_KV_HEAD = replace(MOE, n_kv_heads=1, tie_embeddings=False, logit_scale=0.5)
for_each_model = pytest.mark.parametrize(
    "config", [*CONFIGS.values(), ONE_KV_HEAD], ids=[*CONFIGS, "one-kv-head"]
)
assert_equal = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def cache_for(model, rows, slots=None):
    config = model.config
    return KVCache(config, rows, slots or config.seq_len, like=model.norm.weight)


@for_each_model
@pytest.mark.parametrize("sizes", [[1] * 13, [13], [5, 1, 4, 3]])
@torch.no_grad()
def test_reading_in_parts_gives_the_logits_of_the_whole(config, sizes):
    model, tokens = random_model(config), windows(config)[:, :-1]
    whole, kv_cache = model(tokens), cache_for(model, len(tokens))
    outs = [model(part, kv_cache) for part in tokens.split(sizes, 1)]
    assert_equal(torch.cat([out.logits for out in outs], 1), whole.logits)
    for layer, routing in enumerate(whole.routing):
        shape = len(tokens), -1, config.top_k
        expert_ids = [out.routing[layer].expert_ids_NC.view(shape) for out in outs]
        assert torch.equal(torch.cat(expert_ids, 1).flatten(0, 1), routing.expert_ids_NC)


@for_each_model
@torch.no_grad()
def test_texts_of_different_length_are_read_together_and_some_dropped(config):
    model, tokens = random_model(config), windows(config)[:, :-1]
    whole, kv_cache = model(tokens).logits, cache_for(model, 3, slots=10)
    lengths = [2, 6, 4]
    padded = tokens[:, :6].clone()
    padded[0, 2:], padded[2, 4:] = 7, 8
    logits = model(padded, kv_cache).logits
    kv_cache.lengths = lengths
    for row, length in enumerate(lengths):
        assert_equal(logits[row, :length], whole[row, :length])
    for step in range(3):
        if step == 1:
            kv_cache.select_rows([0, 2])
            tokens, whole, lengths = tokens[[0, 2]], whole[[0, 2]], [2, 4]
        position_B1 = torch.tensor(lengths)[:, None] + step
        logits = model(tokens.gather(1, position_B1), kv_cache).logits[:, 0]
        assert_equal(logits, whole[range(len(lengths)), position_B1[:, 0]])
    assert kv_cache.lengths == [5, 7]


@torch.no_grad()
def test_lowering_the_length_forgets_the_last_tokens():
    model, tokens = random_model(DENSE), windows(DENSE)[:, :-1]
    kv_cache = cache_for(model, 3)
    model(tokens.flip(1)[:, :9], kv_cache)
    kv_cache.lengths = [0, 0, 0]
    assert_equal(model(tokens, kv_cache).logits, model(tokens).logits)


@torch.no_grad()
def test_under_autocast_the_cache_changes_no_more_than_rounding():
    model, tokens = random_model(DENSE).float(), windows(DENSE)[:, :-1]
    with torch.autocast("cpu", torch.bfloat16):
        kv_cache = cache_for(model, 3)
        logits = torch.cat([model(part, kv_cache).logits for part in tokens.split(4, 1)], 1)
        torch.testing.assert_close(logits, model(tokens).logits, rtol=0.1, atol=0.1)


@torch.no_grad()
def test_tokens_that_do_not_fit_the_cache_or_the_context_are_refused():
    model, tokens = random_model(DENSE), windows(DENSE)
    with pytest.raises(ValueError, match="6 tokens do not fit a cache of 5"):
        model(tokens[:, :6], cache_for(model, 3, slots=5))
    kv_cache = cache_for(model, 3, slots=99)
    model(tokens[:, :10], kv_cache)
    with pytest.raises(ValueError, match="14 tokens do not fit a context of 13"):
        model(tokens[:, 10:], kv_cache)
    assert kv_cache.lengths == [10] * 3


@for_each_model
@torch.no_grad()
def test_places_given_on_the_device_are_followed_whatever_the_lengths_were(config):
    model, tokens = random_model(config), windows(config)[:, :-1]
    caches = [cache_for(model, 3, slots=11) for _ in range(2)]
    for kv_cache in caches:
        model(tokens[:, :6], kv_cache)
        kv_cache.lengths = [2, 6, 4]
    by_length, by_place = caches
    place_B1 = torch.tensor([[2], [6], [4]])
    for _ in range(5):
        token_B1 = tokens.gather(1, place_B1)
        by_place.lengths = [2, 6, 4]  # those of the capture
        by_place.next_B1 = place_B1
        assert_equal(model(token_B1, by_place).logits, model(token_B1, by_length).logits)
        place_B1 = place_B1 + 1
    assert by_length.lengths == [7, 11, 9]
