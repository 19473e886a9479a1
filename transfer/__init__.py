"""Growing a model, and the proof that its function was kept."""

from transfer.drift import Drift, GrowthError, grow
from transfer.growth import deepen, plan_for, widen
from transfer.plan import State, carry_out
from transfer.rates import Rate, Rates, rates
from transfer.transfer import upcycle
from transfer.verify import verify

__all__ = [
    "Drift",
    "GrowthError",
    "Rate",
    "Rates",
    "State",
    "carry_out",
    "deepen",
    "grow",
    "plan_for",
    "rates",
    "upcycle",
    "verify",
    "widen",
]
