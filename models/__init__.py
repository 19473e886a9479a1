from models.loss import next_token_loss
from models.model import AXES, SLM, Output, axes, initialise
from models.moe import Routing

__all__ = ["AXES", "SLM", "Output", "Routing", "axes", "initialise", "next_token_loss"]
