from transfer.drift import Drift, GrowthError, grow
from transfer.growth import deepen, plan_for, widen
from transfer.plan import State, carry_out
from transfer.rates import Rate, Rates, rates
from transfer.transfer import upcycle

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
    "widen",
]
