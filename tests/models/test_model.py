import re
from dataclasses import replace
from itertools import chain

import pytest
import torch
import torch.nn.functional as F

import models.model
from models import AXES, SLM, ModelOutput, axes, meta_model, next_token_loss
from models.ops import Ops
from tests.helpers.small_models import (
    CONFIGS,
    DENSE,
    LEARNED,
    LEARNED_MOE,
    for_each_config,
    random_model,
    windows,
)


@for_each_config
def test_no_token_sees_the_future_or_another_window(config):
    model, embeddings = random_model(config), []
    model.embed.register_forward_hook(lambda _, __, x_BTD: embeddings.append(x_BTD))
    logits_BTV = model(windows(config, batch=2)[:, :-1]).logits
    direction_V = torch.randn(config.vocab_size, dtype=torch.double)
    for t in range(config.seq_len):
        score = logits_BTV[0, t] @ direction_V
        (grad_BTD,) = torch.autograd.grad(score, embeddings, retain_graph=True)
        influence_BT = grad_BTD.abs().amax(-1)
        assert (influence_BT[0, : t + 1] > 0).all(), "each token sees its past and itself"
        assert (influence_BT[0, t + 1 :] == 0).all() and (influence_BT[1] == 0).all()


@for_each_config
def test_axes_names_every_dimension_of_every_parameter(config):
    sizes = {
        "vocab": config.vocab_size,
        "position": config.seq_len,
        "embed": config.d_model,
        "heads": config.n_heads * config.head_size,
        "kv_heads": config.kv_heads * config.head_size,
        "ffn": config.d_ff,
        "expert": config.num_experts,
    }
    for name, weight in meta_model(config).named_parameters():
        outputs, input_axis = axes(name)
        expected = [sizes[axis] for axis in (*outputs, input_axis) if axis]
        assert list(weight.shape) == expected, name


def test_every_row_of_axes_is_a_parameter_of_some_model():
    names = {n for config in CONFIGS.values() for n, _ in meta_model(config).named_parameters()}
    assert {re.sub(r"\.\d+\.", ".*.", name) for name in names} == set(AXES)


def test_a_parameter_that_axes_does_not_know_is_an_error():
    with pytest.raises(KeyError, match="bias"):
        axes("blocks.0.attn.q_proj.bias")


@pytest.mark.parametrize("config", [LEARNED, LEARNED_MOE])
def test_a_learned_position_belongs_to_one_place_in_the_window(config):
    model = random_model(config)
    same_token = torch.full((1, config.seq_len), 3)
    with torch.no_grad():
        model.position.weight[:] = model.position.weight[0]
        before_TV = model(same_token).logits[0]
        torch.testing.assert_close(before_TV, before_TV[:1].expand_as(before_TV))
        model.position.weight[5] += 1
        has_moved_T = (model(same_token).logits[0] - before_TV).abs().amax(-1) > 1e-6
    assert has_moved_T.tolist() == [False] * 5 + [True] * (config.seq_len - 5)


def test_fewer_tokens_than_the_context_are_its_beginning_and_more_are_refused():
    model, tokens = random_model(LEARNED), windows(LEARNED)
    whole, start = model(tokens[:, :-1]).logits, model(tokens[:, :4]).logits
    torch.testing.assert_close(start, whole[:, :4])
    with pytest.raises(ValueError, match="14 tokens do not fit a context of 13"):
        model(tokens)


@torch.no_grad()
def test_logits_at_one_position_of_each_row_are_those_among_all_logits():
    out = random_model(DENSE)(windows(DENSE)[:, :-1])
    positions = [3, 0, 12]
    torch.testing.assert_close(out.logits_at(positions), out.logits[range(3), positions])


def test_each_position_predicts_the_token_after_it():
    tokens = torch.tensor([[0, 1, 2], [3, 4, 0]])
    certain_BTV = 50.0 * F.one_hot(tokens[:, 1:], 5)
    assert next_token_loss(output_with_logits(certain_BTV), tokens) < 1e-6
    wrong_BTV = certain_BTV.roll(1, -1)
    assert next_token_loss(output_with_logits(wrong_BTV), tokens) == pytest.approx(50)


@pytest.mark.parametrize("max_rows", [1, 5, 38, 39, 100])
def test_without_gradient_the_loss_in_parts_is_that_at_once(max_rows, monkeypatch):
    tokens = windows(DENSE)  # 3 windows of 13
    model = random_model(replace(DENSE, logit_scale=0.5))
    at_once = next_token_loss(model(tokens[:, :-1]), tokens)
    monkeypatch.setattr(models.model, "MAX_LOGITS", max_rows * DENSE.vocab_size)
    sizes = []

    class CountingOps(Ops):
        def head_loss(self, hidden_ND, *args):
            sizes.append(len(hidden_ND))
            return super().head_loss(hidden_ND, *args)

    with torch.no_grad():
        out = model(tokens[:, :-1])
        parts = ModelOutput(out.hidden_BTD, out.head_VD, out.vocab_size, (), CountingOps())
        in_parts = next_token_loss(parts, tokens)
    assert max(sizes) <= max_rows and sum(sizes) == 39
    torch.testing.assert_close(in_parts, at_once.detach(), rtol=1e-12, atol=0)


def output_with_logits(logits_BTV):
    return ModelOutput(logits_BTV, torch.eye(5), 5, ())


def test_each_kind_of_parameter_is_initialised_by_its_own_law():
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
            outputs, input_axis = axes(name)
            adds_to_stream = outputs[-1] == "embed" and input_axis is not None
            std = 0.02 / (2 * config.n_layers) ** 0.5 if adds_to_stream else 0.02
            assert weight.std().item() == pytest.approx(std, rel=0.06), name
            assert abs(weight.mean().item()) < 0.06 * std, name
