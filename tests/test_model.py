import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import chain

import pytest
import torch
from small import CONFIGS, DENSE, LEARNED, LEARNED_MOE, trained_like, windows

from config import full
from models import AXES, SLM, axes, outline
from models.rotary import rotary, rotate
from transfer import plan_for

every_model = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@every_model
def test_no_token_sees_the_future_or_another_window(config):
    model, seen = trained_like(config), []
    model.embed.register_forward_hook(lambda _, __, x_BTD: seen.append(x_BTD))
    logits_BTV = model(windows(config, batch=2)[:, :-1]).logits
    direction_V = torch.randn(config.vocab_size, dtype=torch.double)
    for t in range(config.seq_len):
        score = logits_BTV[0, t] @ direction_V
        (slope_BTD,) = torch.autograd.grad(score, seen, retain_graph=True)
        reach_BT = slope_BTD.abs().amax(-1)
        assert (reach_BT[0, : t + 1] > 0).all(), "each token sees its past and itself"
        assert (reach_BT[0, t + 1 :] == 0).all() and (reach_BT[1] == 0).all()


@every_model
def test_axes_names_every_dimension_of_every_parameter(config):
    size = {
        "vocab": config.vocab_size,
        "position": config.seq_len,
        "embed": config.d_model,
        "heads": config.n_heads * config.head_size,
        "kv_heads": config.kv_heads * config.head_size,
        "ffn": config.d_ff,
        "expert": config.num_experts,
    }
    for name, weight in outline(config).named_parameters():
        outputs, summed = axes(name)
        named = [size[axis] for axis in (*outputs, summed) if axis]
        assert list(weight.shape) == named, name


def test_every_row_of_axes_is_a_parameter_of_some_model():
    names = {n for config in CONFIGS.values() for n, _ in outline(config).named_parameters()}
    assert {re.sub(r"\.\d+\.", ".*.", name) for name in names} == set(AXES)


def test_a_parameter_that_axes_does_not_know_is_an_error():
    with pytest.raises(KeyError, match="bias"):
        axes("blocks.0.attn.q_proj.bias")


OUTLINES = """
import sys
from models import outline
from small import CONFIGS
for config in CONFIGS.values():
    assert {weight.device.type for weight in outline(config).parameters()} == {"meta"}
assert "torch._dynamo" not in sys.modules, "seconds of every start"
"""


def test_an_outline_has_a_models_shapes_without_torchs_compiler():
    done = subprocess.run(
        [sys.executable, "-c", OUTLINES],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@every_model
def test_parameters_are_counted_without_building_the_model(config):
    sizes = {name: weight.numel() for name, weight in outline(config).named_parameters()}
    experts = sum(size for name, size in sizes.items() if re.search(r"\.moe\.[a-z]+_proj", name))
    idle = experts * (config.num_experts - config.top_k) // (config.num_experts or 1)
    assert config.num_params == sum(sizes.values())
    assert config.num_active_params == sum(sizes.values()) - idle


def test_the_full_preset_grows_from_64_million_to_1_15_billion():
    config, active_and_all = full().model, []
    for phase in full().schedule.values():
        config = plan_for(config, phase.grow)[0] if phase.grow else config
        assert config.num_params == sum(weight.numel() for weight in outline(config).parameters())
        active_and_all.append((config.num_active_params, config.num_params))
    assert active_and_all == [
        (64_279_552, 64_279_552),
        (90_280_960, 245_994_496),
        (309_536_768, 932_390_912),
        (374_054_912, 1_152_622_592),
    ]


@pytest.mark.parametrize("config", [LEARNED, LEARNED_MOE])
def test_a_learned_position_goes_with_the_place_in_the_window(config):
    model = trained_like(config)
    same_token = torch.full((1, config.seq_len), 3)
    with torch.no_grad():
        model.position.weight[:] = model.position.weight[0]
        at_one_place = model(same_token).logits[0]
        torch.testing.assert_close(at_one_place, at_one_place[:1].expand_as(at_one_place))
        model.position.weight[5] += 1
        moved = (model(same_token).logits[0] - at_one_place).abs().amax(-1) > 1e-6
    assert moved.tolist() == [False] * 5 + [True] * (config.seq_len - 5)


def test_rotary_positions_enter_attention_only_as_distances():
    q_TK, k_TK = torch.randn(2, 1, DENSE.head_size).double().expand(2, DENSE.seq_len, -1)
    turn = rotary(torch.arange(DENSE.seq_len), DENSE, q_TK)
    score_TT = rotate(q_TK, *turn) @ rotate(k_TK, *turn).T
    torch.testing.assert_close(score_TT[1:, 1:], score_TT[:-1, :-1])
    assert (score_TT[0].unique()).numel() == DENSE.seq_len


def test_more_tokens_than_the_context_are_refused_and_fewer_are_not():
    model = trained_like(LEARNED)
    tokens = windows(LEARNED)
    whole, start = model(tokens[:, :-1]).logits, model(tokens[:, :4]).logits
    torch.testing.assert_close(start, whole[:, :4])
    with pytest.raises(ValueError, match="14 tokens do not fit a context of 13"):
        model(tokens)


def test_each_kind_of_parameter_starts_by_its_own_law():
    torch.manual_seed(0)
    config = replace(LEARNED_MOE, d_model=96, n_heads=6, d_ff=80, vocab_size=300, seq_len=50)
    bound = (6 / (config.d_model + config.num_experts)) ** 0.5
    models = SLM(config), SLM(replace(config, num_experts=0))
    for name, weight in chain(*(model.named_parameters() for model in models)):
        if name.endswith("norm.weight"):
            assert (weight == 1).all(), name
        elif name.endswith("router.weight"):
            assert 0.95 * bound < weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name
        else:
            onto_the_stream = axes(name)[0][-1] == "embed" and axes(name)[1] is not None
            std = 0.02 / (2 * config.n_layers) ** 0.5 if onto_the_stream else 0.02
            assert weight.std().item() == pytest.approx(std, rel=0.06), name
            assert abs(weight.mean().item()) < 0.06 * std, name
