"""A streamed model computes what the model does, and holds no block that is not computing."""

from collections.abc import Mapping

import pytest
import torch
from small import CONFIGS, trained_like, windows

from transfer import State
from utils.streamed import streamed


class Counted(Mapping):
    """Weights, and which were asked for."""

    def __init__(self, weights):
        self.weights, self.asked = weights, []

    def __getitem__(self, name):
        self.asked.append(name)
        return self.weights[name].clone()

    def __iter__(self):
        return iter(self.weights)

    def __len__(self):
        return len(self.weights)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_computes_the_same_and_lets_go_of_its_blocks(config):
    model, tokens = trained_like(config), windows(config)[:, :-1]
    weights = Counted(State.of(model).weights)
    again = streamed(config, weights)
    assert sorted(weights.asked) == sorted(n for n in weights if not n.startswith("blocks"))
    for _ in range(2):
        assert torch.equal(again(tokens).logits, model(tokens).logits)
        kept = {name: p.device.type for name, p in again.named_parameters()}
        assert {kept[name] for name in kept if name.startswith("blocks")} == {"meta"}
    assert len(weights.asked) == 2 * len(weights) - len([n for n in kept if "blocks" not in n])
