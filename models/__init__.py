"""The model: a Llama when dense, a Mixtral with experts."""

from models.kv_cache import KVCache
from models.meta import meta_model
from models.model import AXES, SLM, ModelOutput, axes, initialize, next_token_loss
from models.moe import Routing

__all__ = [
    "AXES",
    "SLM",
    "KVCache",
    "ModelOutput",
    "Routing",
    "axes",
    "initialize",
    "meta_model",
    "next_token_loss",
]
