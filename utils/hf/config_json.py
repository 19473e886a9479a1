"""Maps a ModelConfig to transformers' config.json and back: Llama's when dense, Mixtral's with
experts."""

from config import InputError, ModelConfig, RopeScaling, TrainingConfig, check_top_k, require

CONFIG_FILE = "config.json"
MODEL_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "seq_len",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
}
"""Keys of config.json, and the field of ModelConfig that holds the same value."""
EXPERT_KEYS = {"num_local_experts": "num_experts", "num_experts_per_tok": "top_k"}
"""The same for the keys that only a Mixtral has."""
ROPE_SCALING_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
}  # fmt: skip
"""For each kind of rotary scaling that can be represented, the keys that describe it."""
HF_DEFAULTS = {
    "llama": {
        "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": None,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
    },
    "mixtral": {
        "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 1e-3,
    },
}  # fmt: skip
"""For each model type that can be read, the value that transformers takes for a missing key."""
REPRESENTABLE = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "sliding_window": (None,),
    "partial_rotary_factor": (None, 1),
    "router_jitter_noise": (0,),
    "quantization_config": (None,),
}
"""Values of keys that no field of ModelConfig holds, under which the model is one of this
project."""
EXPERT_SIZE_MULTIPLE = 8
"""Sizes must be multiples of this for the kernels that transformers uses for experts in bf16."""


def to_hf_config(config: ModelConfig, load_balance_coef: float) -> dict:
    """Returns the entries of config.json that describe the architecture.

    Args:
        config: The model. Its `logit_scale` has no key: `to_hf` folds it into a weight.
        load_balance_coef: Weight of the load-balancing loss; a dense model has no key for it.

    Raises:
        InputError: if no Llama or Mixtral is like that.
    """
    require(
        config.position_embedding == "rope",
        f"model.position_embedding = {config.position_embedding}: no Llama or Mixtral has learned "
        "positions, so transformers cannot load this model without code of its own",
    )
    values = {
        "architectures": ["MixtralForCausalLM" if config.num_experts else "LlamaForCausalLM"],
        "model_type": "mixtral" if config.num_experts else "llama",
        **{key: getattr(config, name) for key, name in MODEL_KEYS.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rope_scaling": rope_scaling_to_hf(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
    }
    if not config.num_experts:
        return values | {"attention_bias": False, "mlp_bias": False}
    values |= {key: getattr(config, name) for key, name in EXPERT_KEYS.items()}
    values |= {"router_aux_loss_coef": load_balance_coef, "sliding_window": None}
    if config.d_model % EXPERT_SIZE_MULTIPLE or config.d_ff % EXPERT_SIZE_MULTIPLE:
        values["experts_implementation"] = "eager"
    return values


def rope_scaling_to_hf(scaling: RopeScaling) -> dict | None:
    """Returns the entry `rope_scaling` of config.json."""
    entries = {key: getattr(scaling, key) for key in ROPE_SCALING_KEYS[scaling.rope_type]}
    return {"rope_type": scaling.rope_type, **entries} if entries else None


def from_hf_config(values: dict) -> tuple[ModelConfig, float]:
    """Returns the model that a config.json describes, and the weight of its load-balancing loss
    (this project's default for a dense model).

    Raises:
        InputError: naming key and value, for what cannot be represented.
    """
    family = str(values.get("model_type"))
    require(
        family in HF_DEFAULTS,
        f"model_type = {family}: only {' and '.join(HF_DEFAULTS)} can be read",
    )
    try:
        rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
        values = HF_DEFAULTS[family] | values | rope
        for key, allowed in REPRESENTABLE.items():
            value = values.get(key, allowed[0])
            require(value in allowed, f"{key} = {value} cannot be represented")
        layer_types = values.get("layer_types") or ()
        require(
            set(layer_types) <= {"full_attention"},
            f"layer_types = {layer_types} cannot be represented, only full_attention",
        )
        keys = MODEL_KEYS | (EXPERT_KEYS if family == "mixtral" else {})
        if family == "mixtral":
            experts_key, top_k_key = EXPERT_KEYS
            check_top_k(top_k_key, values[top_k_key], experts_key, values[experts_key])
        config = ModelConfig(
            **{name: values[key] for key, name in keys.items()},
            n_kv_heads=values["num_key_value_heads"],
            head_dim=values.get("head_dim"),
            rope_scaling=rope_scaling_from_hf(values),
            tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        )
    except (TypeError, AttributeError, KeyError) as error:
        raise InputError(f"it is not as transformers would write it ({error})") from error
    return config, values.get("router_aux_loss_coef", TrainingConfig.load_balance_coef)


def rope_scaling_from_hf(values: dict) -> RopeScaling:
    """Returns the rotary scaling that the entries of `rope_scaling` describe, given them among
    those of config.json. Raises InputError or KeyError where they describe none."""
    kind = values.get("rope_type", values.get("type", "default"))
    require(kind in ROPE_SCALING_KEYS, f"rope_type = {kind} cannot be represented")
    values = {"original_max_position_embeddings": values["max_position_embeddings"]} | values
    return RopeScaling(kind, **{key: values[key] for key in ROPE_SCALING_KEYS[kind]})
