"""The mapping to transformers' configuration and tensors, and back."""

from dataclasses import asdict, replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from config import InputError, RopeScaling
from tests.helpers.small_models import (
    DENSE,
    IMPORTED,
    LEARNED,
    MOE,
    is_identical,
    random_train_state,
)
from transfer import TrainState
from utils.hf.config_json import (
    EXPERT_KEYS,
    HF_DEFAULTS,
    MODEL_KEYS,
    from_hf_config,
    to_hf_config,
)
from utils.hf.state_dict import from_hf, hf_shapes, to_hf

LINEAR = replace(DENSE, rope_scaling=RopeScaling("linear", 2.0), rope_theta=777.0, norm_eps=1e-3)
every_config = pytest.mark.parametrize("config", [DENSE, MOE, IMPORTED, LINEAR])


@every_config
def test_a_configuration_there_and_back_is_what_it_was(config):
    resolved = replace(config, n_kv_heads=config.kv_heads, head_dim=config.head_size)
    load_balance_coef = 0.025 if config.num_experts else 0.01  # only a Mixtral has a key for it
    values = to_hf_config(config, load_balance_coef)
    assert from_hf_config(values) == (resolved, load_balance_coef)
    read = AutoConfig.for_model(**values).to_dict()  # all that transformers makes of it
    assert from_hf_config(read) == (resolved, load_balance_coef)


def test_transformers_reads_every_setting_of_an_exported_model():
    scaling = RopeScaling("llama3", 4.0, original_max_position_embeddings=20)
    config = replace(MOE, n_kv_heads=2, head_dim=10, seq_len=48, norm_eps=1e-3, rope_theta=777.0)
    config = replace(config, num_experts=5, top_k=3, rope_scaling=scaling)
    read = AutoConfig.for_model(**to_hf_config(config, 0.025))
    assert (read.num_local_experts, read.num_experts_per_tok) == (5, 3)
    assert read.router_aux_loss_coef == 0.025
    assert (read.head_dim, read.num_key_value_heads, read.rms_norm_eps) == (10, 2, 1e-3)
    assert read.tie_word_embeddings and read.max_position_embeddings == 48
    assert read.rope_parameters == {"rope_theta": 777.0, **asdict(scaling)}


@pytest.mark.parametrize("family", HF_DEFAULTS)
def test_a_key_that_is_missing_means_what_it_means_to_transformers(family):
    keys = {*MODEL_KEYS, *EXPERT_KEYS, "num_key_value_heads", "router_aux_loss_coef"}
    theirs = AutoConfig.for_model(family)
    written = {key: value for key, value in theirs.to_dict().items() if key in keys}
    written |= {"rope_theta": theirs.rope_parameters["rope_theta"], "model_type": family}
    (own, coef), (config, their_coef) = map(from_hf_config, ({"model_type": family}, written))
    assert replace(own, n_kv_heads=own.kv_heads) == config and coef == their_coef


def test_learned_positions_are_refused():
    with pytest.raises(InputError, match=r"model.position_embedding = learned: no Llama"):
        to_hf_config(LEARNED, 0.01)


def test_a_mixtral_whose_tokens_visit_one_of_several_experts_is_refused_by_its_own_keys():
    values = to_hf_config(MOE, 0.01) | {"num_experts_per_tok": 1}
    message = "num_experts_per_tok = 1 with num_local_experts = 5:.* gives the router no gradient"
    with pytest.raises(InputError, match=message):
        from_hf_config(values)


@pytest.mark.parametrize("config", [DENSE, IMPORTED])
def test_the_tensors_are_those_of_transformers_own_model(config):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**to_hf_config(config, 0.01)))
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert hf_shapes(config) == shapes


@every_config
def test_weights_there_and_back_are_what_they_were_bit_for_bit(config):
    state = random_train_state(config)
    tensors = to_hf(config, dict(state.weights))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == hf_shapes(config)
    weights = from_hf(config, tensors.__getitem__)
    assert is_identical(TrainState(config, weights), TrainState(config, state.weights))


def test_the_scale_of_the_logits_is_folded_into_the_last_norm():
    weights = random_train_state(DENSE).weights
    plain, scaled = (
        to_hf(replace(DENSE, logit_scale=scale), dict(weights)) for scale in (1.0, 0.5)
    )
    norm = "model.norm.weight"
    torch.testing.assert_close(scaled.pop(norm), 0.5 * plain.pop(norm))
    torch.testing.assert_close(scaled, plain, rtol=0, atol=0)
