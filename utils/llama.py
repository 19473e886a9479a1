"""Llama and Mixtral as transformers has them: their config.json and the names of their tensors."""

import re
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from config import InputError, ModelConfig, RopeScaling, require
from transfer.plan import shapes

NAMES = {
    "embed.weight":                  "model.embed_tokens.weight",
    "blocks.*.attn_norm.weight":     "model.layers.*.input_layernorm.weight",
    "blocks.*.attn.q_proj.weight":   "model.layers.*.self_attn.q_proj.weight",
    "blocks.*.attn.k_proj.weight":   "model.layers.*.self_attn.k_proj.weight",
    "blocks.*.attn.v_proj.weight":   "model.layers.*.self_attn.v_proj.weight",
    "blocks.*.attn.o_proj.weight":   "model.layers.*.self_attn.o_proj.weight",
    "blocks.*.ffn_norm.weight":      "model.layers.*.post_attention_layernorm.weight",
    "blocks.*.mlp.gate_proj.weight": "model.layers.*.mlp.gate_proj.weight",
    "blocks.*.mlp.up_proj.weight":   "model.layers.*.mlp.up_proj.weight",
    "blocks.*.mlp.down_proj.weight": "model.layers.*.mlp.down_proj.weight",
    "blocks.*.moe.router.weight":    "model.layers.*.block_sparse_moe.gate.weight",
    "blocks.*.moe.gate_proj":        "model.layers.*.block_sparse_moe.experts.*.w1.weight",
    "blocks.*.moe.down_proj":        "model.layers.*.block_sparse_moe.experts.*.w2.weight",
    "blocks.*.moe.up_proj":          "model.layers.*.block_sparse_moe.experts.*.w3.weight",
    "norm.weight":                   "model.norm.weight",
    "head.weight":                   "lm_head.weight",
}  # fmt: skip
"""Of each parameter here, in the files that transformers reads; the second * is the expert."""

# What a key of config.json means, and what transformers takes it for where it is missing.
SHAPE = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "seq_len",
}
EXPERTS = {"num_local_experts": "num_experts", "num_experts_per_tok": "top_k"}
DEFAULTS = {
    "llama": {
        "num_key_value_heads": None, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
    },
    "mixtral": {
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 1e-3,
    },
}  # fmt: skip
GROUPED = 8
"""A multiple that transformers' usual implementation of experts needs sizes to be, in bf16."""
REPRESENTED = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "sliding_window": (None,),
    "partial_rotary_factor": (None, 1),
    "router_jitter_noise": (0,),
    "quantization_config": (None,),
}
"""Values under which a key may be there, because nothing here depends on it."""


def their_names(name: str, num_experts: int) -> list[str]:
    """The tensors that a parameter is in transformers' files: one, or one for each expert."""
    theirs = NAMES[re.sub(r"^blocks\.\d+", "blocks.*", name)]
    if name.startswith("blocks."):
        theirs = theirs.replace("*", name.split(".")[1], 1)
    return [theirs.replace("*", str(i)) for i in range(num_experts)] if "*" in theirs else [theirs]


def their_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of transformers' model."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes(config).items():
        names = their_names(name, config.num_experts)
        one = shape[1:] if "experts" in names[0] else shape
        found |= dict.fromkeys(names, tuple(one))
    return found


def to_theirs(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, by transformers' names. The last norm's gain takes the head's scale, of
    which transformers knows nothing."""
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        names = their_names(name, config.num_experts)
        if name == "norm.weight" and config.logit_scale != 1:
            weight = weight * config.logit_scale
        found.update(zip(names, weight if "experts" in names[0] else [weight], strict=True))
    return found


def from_theirs(config: ModelConfig, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Parameters by our names; `read` gives a tensor by transformers' name."""

    def one(name: str) -> Tensor:
        names = their_names(name, config.num_experts)
        return torch.stack([*map(read, names)]) if "experts" in names[0] else read(names[0])

    return {name: one(name) for name in shapes(config)}


def to_json(config: ModelConfig, balance_coef: float) -> dict:
    """What config.json says of the architecture. Raises InputError where no Llama is like that."""
    require(
        config.position == "rope",
        f"model.position = {config.position}: no Llama or Mixtral has learned positions, so "
        "transformers cannot load this model without code of its own",
    )
    moe = config.num_experts > 0
    said = {
        "architectures": ["MixtralForCausalLM" if moe else "LlamaForCausalLM"],
        "model_type": "mixtral" if moe else "llama",
        **{key: getattr(config, field) for key, field in SHAPE.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling_to_json(config.rope_scaling),
        "tie_word_embeddings": config.tied,
        "attention_dropout": 0.0,
    }
    if moe:
        said |= {key: getattr(config, field) for key, field in EXPERTS.items()}
        said |= {"router_aux_loss_coef": balance_coef, "sliding_window": None}
        if config.d_model % GROUPED or config.d_ff % GROUPED:
            said["experts_implementation"] = "eager"
        return said
    return said | {"attention_bias": False, "mlp_bias": False}


def scaling_to_json(scaling: RopeScaling) -> dict | None:
    if scaling.rope_type == "default":
        return None
    if scaling.rope_type == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return asdict(scaling)


def from_json(said: dict) -> ModelConfig:
    """Raises InputError, naming key and value, for what cannot be represented."""
    family = said.get("model_type")
    require(family in DEFAULTS, f"model_type = {family}: only {' and '.join(DEFAULTS)} can be read")
    said = DEFAULTS[str(family)] | said
    for key, allowed in REPRESENTED.items():
        value = said.get(key, allowed[0])
        require(value in allowed, f"{key} = {value} cannot be represented")
    rope = {"rope_theta": said["rope_theta"]}
    rope |= said.get("rope_scaling") or said.get("rope_parameters") or {}
    fields = SHAPE | (EXPERTS if family == "mixtral" else {})
    for key in fields:
        require(type(said.get(key)) is int, f"{key} = {said.get(key)} must be a whole number")
    try:
        return ModelConfig(
            **{field: said[key] for key, field in fields.items()},
            n_kv_heads=said["num_key_value_heads"],
            head_dim=said.get("head_dim"),
            rope_theta=float(rope["rope_theta"]),
            rope_scaling=scaling_from_json(rope, said["max_position_embeddings"]),
            tied=bool(said.get("tie_word_embeddings", False)),
            norm_eps=said["rms_norm_eps"],
        )
    except (TypeError, AttributeError, KeyError) as error:
        raise InputError(f"it is not as transformers would write it ({error})") from error


def scaling_from_json(rope: dict, seq_len: int) -> RopeScaling:
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", 1)
    require(partial == 1, f"partial_rotary_factor = {partial} cannot be represented")
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", rope["factor"])
    require(kind == "llama3", f"rope_type = {kind} cannot be represented")
    original = rope.get("original_max_position_embeddings", seq_len)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    return RopeScaling("llama3", rope["factor"], low, high, original)
