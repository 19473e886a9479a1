"""Names and shapes of the tensors in transformers' files for Llama and Mixtral, to and from the
parameters of this project."""

import re
from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from config import ModelConfig
from transfer.plan import param_shapes

HF_NAMES = {
    "embed.weight":                  "model.embed_tokens.weight",
    "blocks.*.attn_norm.weight":     "model.layers.{layer}.input_layernorm.weight",
    "blocks.*.attn.q_proj.weight":   "model.layers.{layer}.self_attn.q_proj.weight",
    "blocks.*.attn.k_proj.weight":   "model.layers.{layer}.self_attn.k_proj.weight",
    "blocks.*.attn.v_proj.weight":   "model.layers.{layer}.self_attn.v_proj.weight",
    "blocks.*.attn.o_proj.weight":   "model.layers.{layer}.self_attn.o_proj.weight",
    "blocks.*.ffn_norm.weight":      "model.layers.{layer}.post_attention_layernorm.weight",
    "blocks.*.mlp.gate_proj.weight": "model.layers.{layer}.mlp.gate_proj.weight",
    "blocks.*.mlp.up_proj.weight":   "model.layers.{layer}.mlp.up_proj.weight",
    "blocks.*.mlp.down_proj.weight": "model.layers.{layer}.mlp.down_proj.weight",
    "blocks.*.moe.router.weight":    "model.layers.{layer}.block_sparse_moe.gate.weight",
    "blocks.*.moe.gate_proj":   "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
    "blocks.*.moe.down_proj":   "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
    "blocks.*.moe.up_proj":     "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
    "norm.weight":                   "model.norm.weight",
    "head.weight":                   "lm_head.weight",
}  # fmt: skip
"""Each parameter, and the tensor that holds it in transformers' files; a parameter that stacks the
matrices of all experts is a tensor per expert there."""
LAYER_NUMBER = re.compile(r"\d+")


def hf_template(name: str) -> str:
    """Returns the row of HF_NAMES for a parameter. Raises KeyError where there is none."""
    return HF_NAMES[LAYER_NUMBER.sub("*", name)]


def is_stacked(name: str) -> bool:
    """Whether a parameter stacks a matrix per expert along its first dimension."""
    return "{expert}" in hf_template(name)


def hf_names(name: str, num_experts: int) -> list[str]:
    """Returns the tensors that hold a parameter in transformers' files, in the experts' order."""
    layer = LAYER_NUMBER.search(name)
    experts = range(num_experts) if is_stacked(name) else [0]
    template = hf_template(name)
    return [template.format(layer=layer and layer[0], expert=expert) for expert in experts]


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor in transformers' files, by name."""
    return {
        hf_name: tuple(shape[1:] if is_stacked(name) else shape)
        for name, shape in param_shapes(config).items()
        for hf_name in hf_names(name, config.num_experts)
    }


def to_hf(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of transformers' files, by name.

    Args:
        config: The model. The gain of its last norm takes the `logit_scale`, which transformers
            does not have.
        weights: The parameters by name. The dictionary is emptied, so that both forms of a model
            need not lie in memory: experts are copied out of their stack, because
            `save_torch_state_dict` refuses tensors that share their storage.
    """
    tensors: dict[str, Tensor] = {}
    for name in list(weights):
        weight = weights.pop(name)
        if name == "norm.weight" and config.logit_scale != 1:
            weight = weight * config.logit_scale
        parts = [expert.clone() for expert in weight] if is_stacked(name) else [weight]
        tensors.update(zip(hf_names(name, config.num_experts), parts, strict=True))
    return tensors


def from_hf(config: ModelConfig, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Returns the parameters by name; `read` gives a tensor of transformers' files by its name."""

    def read_param(name: str) -> Tensor:
        tensors = [read(hf_name) for hf_name in hf_names(name, config.num_experts)]
        if not is_stacked(name):
            return tensors[0]
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        return torch.stack([tensor.to(dtype) for tensor in tensors])

    return {name: read_param(name) for name in param_shapes(config)}
