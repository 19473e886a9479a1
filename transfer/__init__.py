"""Growing a model, and the proof that its function was kept."""

from transfer.drift import Drift, GrowthError, grow
from transfer.growth import deepen, plan_for, widen
from transfer.plan import State, carry_out
from transfer.transfer import upcycle
from transfer.verify import verify

__all__ = [
    "Drift",
    "GrowthError",
    "State",
    "carry_out",
    "deepen",
    "grow",
    "plan_for",
    "upcycle",
    "verify",
    "widen",
]
