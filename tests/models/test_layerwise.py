"""A model that loads its blocks as they compute is the same function."""

import torch

from models.layerwise import LazyTensors, layerwise_model
from tests.helpers.small_models import for_each_config, random_model, windows
from transfer import TrainState


@for_each_config
def test_it_computes_the_same_and_a_block_has_weights_only_while_it_computes(config):
    model, tokens = random_model(config), windows(config)[:, :-1]
    weights = TrainState.from_model(model).weights
    layerwise = layerwise_model(config, LazyTensors([*weights], lambda name: weights[name].clone()))
    loaded_blocks = []

    def note_loaded_blocks(*_):
        has_weights = [not all(p.is_meta for p in b.parameters()) for b in layerwise.blocks]
        loaded_blocks.append(has_weights)

    for block in layerwise.blocks:
        block.attn.register_forward_pre_hook(note_loaded_blocks)
    for _ in range(2):
        assert torch.equal(layerwise(tokens).logits, model(tokens).logits)
        assert all(p.is_meta for p in layerwise.blocks.parameters())
    assert loaded_blocks == 2 * [[True, False], [False, True]]
