"""The architecture is Llama's and Mixtral's: transformers' models, given our weights, compute what
ours do."""

from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from config import RopeScaling
from tests.helpers.small_models import (
    DENSE,
    LLAMA3_SCALING,
    MOE,
    random_model,
    reference_loss,
    windows,
)
from utils.generate.sampling import Sampling
from utils.generate.stories import generate

OUR_WORDS = {
    "model.": "",
    "embed_tokens": "embed",
    "layers": "blocks",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn": "attn",
    "mlp.gate.weight": "moe.router.weight",
    "mlp.experts": "moe",
    "lm_head": "head",
}
"""Parts of transformers' parameter names, and what they are called here. It is written apart from
utils/hf, which is tested with transformers too."""
for_each_architecture = pytest.mark.parametrize(
    "config",
    [
        replace(base, **changes)
        for base in (DENSE, MOE)
        for changes in (
            {},
            {"tie_embeddings": False, "rope_theta": 500.0},
            {"n_kv_heads": None, "logit_scale": 0.25},
            {"head_dim": 6, "rope_scaling": RopeScaling("linear", 3.0)},
            {"head_dim": 6, "rope_scaling": LLAMA3_SCALING},
            {"n_kv_heads": 1, "logit_scale": 3.0, "tie_embeddings": False, "norm_eps": 1e-2},
        )
    ],
)


def reference_model(model):
    """Returns transformers' model of the same shape with the weights of `model`."""
    config = model.config
    shape = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.seq_len,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "head_dim": config.head_size,
        "rope_parameters": {"rope_theta": config.rope_theta, **asdict(config.rope_scaling)},
        "attn_implementation": "eager",
    }
    if config.num_experts:
        experts = {"num_local_experts": config.num_experts, "num_experts_per_tok": config.top_k}
        hf = MixtralForCausalLM(MixtralConfig(**shape, **experts, experts_implementation="eager"))
    else:
        hf = LlamaForCausalLM(LlamaConfig(**shape))

    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    weights["norm.weight"] *= config.logit_scale
    weights.setdefault("head.weight", weights["embed.weight"])
    for name in [name for name in weights if name.endswith("moe.gate_proj")]:
        gate_and_up = weights[name], weights[name.replace("gate", "up")]
        weights[name.replace("gate", "gate_up")] = torch.cat(gate_and_up, 1)
    hf.load_state_dict({name: weights[our_name(name)] for name in hf.state_dict()})
    return hf.to(model.embed.weight.dtype)


def our_name(name):
    for theirs, ours in OUR_WORDS.items():
        name = name.replace(theirs, ours)
    return name


@for_each_architecture
def test_logits_and_loss_and_the_embeddings_gradient_are_those_of_the_reference(config):
    model, tokens = random_model(config).float(), windows(config)
    reference = reference_model(model)
    logits = reference(tokens[:, :-1], use_cache=False).logits
    torch.testing.assert_close(model(tokens[:, :-1]).logits, logits, rtol=1e-5, atol=1e-5)

    loss = reference_loss(model, tokens)
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    gradient = reference.get_input_embeddings().weight.grad
    torch.testing.assert_close(model.embed.weight.grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_k", [2, 3, 5])
def test_the_balance_loss_of_each_layer_is_that_of_the_reference(top_k):
    config, inputs = replace(MOE, top_k=top_k), []
    model = random_model(config).float()
    for block in model.blocks:
        block.moe.register_forward_hook(lambda moe, x, _: inputs.append((moe.router.weight, x[0])))
    routing = model(windows(config)[:, :-1]).routing
    assert len(routing) == config.n_layers
    for layer, (weight_ED, x_BTD) in zip(routing, inputs, strict=True):
        logits_NE = x_BTD.flatten(0, 1) @ weight_ED.T
        expected = load_balancing_loss_func((logits_NE,), config.num_experts, top_k)
        torch.testing.assert_close(layer.load_balance_loss, expected)


@for_each_architecture
def test_the_likeliest_text_is_the_one_that_the_reference_generates(config):
    model = random_model(replace(config, seq_len=40))
    with torch.no_grad():
        for weight in model.blocks.parameters():
            weight *= 3  # or a tied head would see little but the last token
    reference, starts = reference_model(model), [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3]]
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": 0}
    texts = [reference.generate(torch.tensor([start]), **options) for start in starts]
    expected = [text[0, len(start) :].tolist() for text, start in zip(texts, starts, strict=True)]
    expected = [text[: text.index(0)] if 0 in text else text for text in expected]
    assert generate(model, starts, 30, (0,), Sampling(temperature=0)) == expected
    assert len(set().union(*expected)) > 3
