import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from config import InputError
from models import SLM
from tests.helpers.small_models import DENSE, LEARNED, MOE, random_model, windows
from transfer import GrowthError, deepen, upcycle, verify, widen
from transfer.probe import ProbeOutput
from transfer.verify import match_blocks

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype, tolerance", [(torch.double, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "config, growths",
    [
        (DENSE, [lambda m: upcycle(m, 4)]),
        (LEARNED, [widen, deepen]),
        (MOE, [deepen]),
        (MOE, [lambda m: widen(m, 3), lambda m: deepen(m, 2)]),
        (DENSE, [deepen, upcycle, widen, deepen]),
    ],
)
def test_a_grown_model_is_the_same_function_and_the_difference_is_measured(
    config, growths, dtype, tolerance
):
    before = after = random_model(config).to(dtype)
    for growth in growths:
        after = growth(after)
    drift = verify(before, after, windows(config))
    assert drift.max_logit_diff < tolerance and abs(drift.loss_drift) < tolerance
    assert drift.max_logit_diff <= drift.logit_limit < 1e-4
    assert drift.probe_tokens == 3 * 13 and drift.flipped == drift.top1_changed == 0
    assert (drift.load_max is None) == (not after.config.num_experts)


@pytest.mark.parametrize("factor", [2, 3])
def test_a_model_in_bf16_is_widened_as_exactly_as_one_in_float32(factor):
    before = random_model(DENSE).bfloat16()
    drift = verify(before, widen(before, factor), windows(DENSE))
    assert drift.max_logit_diff < 1e-6 * drift.loss_before


def test_a_model_that_has_changed_is_an_error_that_holds_the_measurements():
    before, tokens = random_model(DENSE), windows(DENSE)
    after = widen(before)
    with torch.no_grad():
        after.blocks[1].mlp.up_proj.weight[0] *= 3
    with pytest.raises(GrowthError, match=r"a logit moved by .*; the loss moved by") as raised:
        verify(before, after, tokens)
    drift = raised.value.drift
    assert drift.max_logit_diff > 1e-3
    loose = verify(before, after, tokens, max_logit_drift=99.0, max_loss_drift=9.0)
    assert loose == replace(drift, logit_limit=99.0)
    with pytest.raises(GrowthError, match="a logit moved"):
        verify(before, after, tokens, drift.max_logit_diff / 2, 9.0)


def test_other_routing_is_an_error_where_both_models_have_the_same_experts():
    before, tokens = random_model(MOE), windows(MOE)
    after = widen(before)
    with torch.no_grad():
        after.blocks[1].moe.router.weight.neg_()
    with pytest.raises(GrowthError, match="the routing of"):
        verify(before, after, tokens, 99.0, 99.0)
    other = random_model(replace(MOE, num_experts=4))
    assert verify(before, other, tokens, 99.0, 99.0).flipped == 0


@pytest.mark.parametrize("old", [[0, 1, 2, 3, 4, 5], [1, 2, 5], [0, 4], [3], []])
def test_layers_are_matched_by_which_tokens_they_route_where(old):
    expert_ids = torch.randint(5, (2, 6, 50, 2), generator=torch.Generator().manual_seed(0))
    earlier = expert_ids[:, old].clone()
    earlier[0, :, 7] = 9  # one token of each layer is flipped
    nothing = torch.zeros(0)
    outputs = (ProbeOutput(nothing, None, nothing, ids, nothing) for ids in (earlier, expert_ids))
    assert match_blocks(*outputs) == [old.index(i) if i in old else None for i in range(6)]


@pytest.mark.parametrize(
    "changes, tokens, message",
    [
        ({"vocab_size": 30}, None, "after.vocab_size = 30 is not before.vocab_size = 29"),
        ({"seq_len": 14}, None, "after.seq_len = 14 is not before.seq_len = 13"),
        ({"n_layers": 1}, None, "after.n_layers = 1 is less than before's 2"),
        ({}, torch.zeros(2, 15, dtype=torch.long), "(2, 15) tensor of int64 must have 2 to 14"),
        ({}, torch.zeros(2, 1, dtype=torch.long), "(2, 1) tensor of int64 must have 2 to 14"),
        ({}, torch.zeros(5, dtype=torch.long), "(5,) tensor of int64 must be texts (B, T)"),
        ({}, torch.zeros(0, 5, dtype=torch.long), "(0, 5) tensor of int64 must be texts (B, T)"),
        ({}, torch.zeros(2, 5), "(2, 5) tensor of float32 must be texts (B, T) of int64"),
        ({}, torch.full((2, 5), 29), "tokens from 29 to 29 are not all in a vocabulary of 29"),
        ({}, torch.full((2, 5), -1), "tokens from -1 to -1 are not all"),
    ],
)
def test_models_and_tokens_that_do_not_belong_together_are_refused_by_name(
    changes, tokens, message
):
    tokens = windows(DENSE) if tokens is None else tokens
    with pytest.raises(InputError, match=re.escape(message)):
        verify(SLM(DENSE), SLM(replace(DENSE, **changes)), tokens)


def test_a_limit_out_of_range_is_refused_by_name():
    model = SLM(DENSE)
    with pytest.raises(InputError, match="max_logit_drift = -1"):
        verify(model, model, windows(DENSE), max_logit_drift=-1)


def test_the_code_in_the_readme_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    blocks = [block for block in blocks if "pandas" not in block]  # that one is test_history's
    assert any("verify(" in block for block in blocks)
    for block in blocks:
        exec(block, {})
