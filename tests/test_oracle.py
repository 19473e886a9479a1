"""The architecture is Llama's and Mixtral's: theirs, given our weights, computes what ours does."""

from dataclasses import asdict, replace

import pytest
import torch
from small import DENSE, MOE, SCALING, next_token_loss, trained_like, windows
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from config import RopeScaling
from utils.generate import Sampling, generate

OURS = {
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
models = pytest.mark.parametrize(
    "config",
    [
        replace(base, **changes)
        for base in (DENSE, MOE)
        for changes in (
            {},
            {"tied": False, "rope_theta": 500.0},
            {"n_kv_heads": None, "logit_scale": 0.25},
            {"head_dim": 6, "rope_scaling": RopeScaling("linear", 3.0)},
            {"head_dim": 6, "rope_scaling": SCALING},
            {"n_kv_heads": 1, "logit_scale": 3.0, "tied": False, "norm_eps": 1e-2},
        )
    ],
)


def theirs(model):
    """Their model with our weights."""
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
        "tie_word_embeddings": config.tied,
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
        parts = weights[name], weights[name.replace("gate", "up")]
        weights[name.replace("gate", "gate_up")] = torch.cat(parts, 1)
    hf.load_state_dict({name: weights[our_name(name)] for name in hf.state_dict()})
    return hf.to(model.embed.weight.dtype)


def our_name(name):
    for their, our in OURS.items():
        name = name.replace(their, our)
    return name


@models
def test_logits_and_loss_and_the_embeddings_gradient_are_those_of_the_reference(config):
    ours, tokens = trained_like(config).float(), windows(config)
    reference = theirs(ours)
    logits = reference(tokens[:, :-1], use_cache=False).logits
    torch.testing.assert_close(ours(tokens[:, :-1]).logits, logits, rtol=1e-5, atol=1e-5)

    loss = next_token_loss(ours, tokens)
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, want)
    loss.backward()
    want.backward()
    slope = reference.get_input_embeddings().weight.grad
    torch.testing.assert_close(ours.embed.weight.grad, slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_balance_loss_of_each_layer_is_the_reference_s(top_k):
    config, inputs = replace(MOE, top_k=top_k), []
    model = trained_like(config).float()
    for block in model.blocks:
        block.moe.register_forward_hook(lambda moe, x, _: inputs.append((moe.router.weight, x[0])))
    routing = model(windows(config)[:, :-1]).routing
    assert len(routing) == config.n_layers
    for layer, (weight_ED, x_BTD) in zip(routing, inputs, strict=True):
        logits_NE = x_BTD.flatten(0, 1) @ weight_ED.T
        want = load_balancing_loss_func((logits_NE,), config.num_experts, top_k)
        torch.testing.assert_close(layer.balance, want)


@models
def test_the_likeliest_text_is_the_one_that_the_reference_generates(config):
    ours = trained_like(replace(config, seq_len=40))
    with torch.no_grad():
        for weight in ours.blocks.parameters():
            weight *= 3  # or a tied head would see little but the last token
    reference, starts = theirs(ours), [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3]]
    alone = [
        reference.generate(
            torch.tensor([start]), max_new_tokens=30, do_sample=False, eos_token_id=0
        )
        for start in starts
    ]
    want = [text[0, len(start) :].tolist() for text, start in zip(alone, starts, strict=True)]
    want = [text[: text.index(0)] if 0 in text else text for text in want]
    assert generate(ours, starts, 30, 0, Sampling(temperature=0)) == want
    assert len({*want[0], *want[1], *want[2]}) > 3
