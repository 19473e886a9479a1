"""In float64, growing and then training is training and then growing, and no rule can be broken."""

import pytest

from config import Deepen, TrainingConfig, Widen
from tests.helpers.small_models import CONFIGS, DENSE, MOE
from transfer import AdamWScale
from utils.optim.commutation import MAX_GAP, CommutationTest, mutations, set_scale

WIDEN_2, WIDEN_3 = Widen(2, noise=0.0), Widen(3, noise=0.0)
INTERLEAVED, MIDDLE, END = (Deepen(2, where) for where in ("interleaved", "middle", "end"))
CASES = [(name, growth) for name in ("dense", "moe") for growth in (WIDEN_2, WIDEN_3, INTERLEAVED)]
CASES += [("learned-moe", growth) for growth in (WIDEN_3, MIDDLE, END)]
IDS = [f"{name}-{type(growth).__name__}" for name, growth in CASES]


@pytest.mark.parametrize("name, growth", CASES, ids=IDS)
def test_growing_then_training_is_training_then_growing_with_clipping_and_decay(name, growth):
    test = CommutationTest(CONFIGS[name], growth)
    assert max(test.gap()) < MAX_GAP
    assert min(test.grad_norms) > test.training.grad_clip and test.training.weight_decay


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("growth", [WIDEN_2, INTERLEAVED], ids=["widen", "deepen"])
def test_every_rule_that_is_broken_opens_a_gap(config, growth):
    test = CommutationTest(config, growth)
    assert test.gap()[0] < MAX_GAP
    same = {f"same {field}": set_scale(**{field: 1.0}) for field in AdamWScale._fields}
    rules = mutations(growth) | (same if isinstance(growth, Widen) else {})
    for name, mutation in rules.items():
        # The smallest gap, that of eps, is not large, but a million times the rounding.
        assert test.gap(mutation)[0] > 1e6 * MAX_GAP, name


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_decay_commutes_where_it_is_as_much_stronger_as_the_learning_rate_is_smaller(config):
    test = CommutationTest(config, WIDEN_2, TrainingConfig(weight_decay=0.3))
    assert max(test.gap()) < MAX_GAP
    assert test.gap(set_scale(weight_decay=1.0))[0] > 1e9 * MAX_GAP
