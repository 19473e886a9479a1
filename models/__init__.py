"""The model: a Llama when dense, a Mixtral with experts."""

from models.cache import Cache
from models.loss import next_token_loss
from models.model import AXES, SLM, Output, axes, initialise
from models.moe import Routing
from models.outline import outline

__all__ = [
    "AXES",
    "SLM",
    "Cache",
    "Output",
    "Routing",
    "axes",
    "initialise",
    "next_token_loss",
    "outline",
]
