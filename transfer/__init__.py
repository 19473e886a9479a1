"""Growing a model, and the proof that its function was kept."""

from transfer.checks import FunctionDrift, GrowthError, grow
from transfer.growth import deepen, make_plan, widen
from transfer.lr_scaling import AdamWScale, AdamWScales, adamw_scales
from transfer.plan import TrainState, apply_plan
from transfer.transfer import upcycle
from transfer.verify import verify

__all__ = [
    "AdamWScale",
    "AdamWScales",
    "FunctionDrift",
    "GrowthError",
    "TrainState",
    "adamw_scales",
    "apply_plan",
    "deepen",
    "grow",
    "make_plan",
    "upcycle",
    "verify",
    "widen",
]
