"""How far apart chance alone puts the variants of an experiment.

A loss is taken to be that of its variant, plus what its seed adds to every variant, plus a normal
residual of one variance. Variants are compared by the means over seeds; the variance is pooled over
all of them. Tukey's range test then covers all pairs at once, the best variant's with any other
included, although it is the data that say which one is the best.

    margin = chance_margin(losses_VS)    # V variants x S seeds
    abs(losses_VS[0].mean() - losses_VS[1].mean()) > margin    # by chance in 5 % of experiments
"""

from functools import cache
from math import nan, sqrt

import numpy as np

CONFIDENCE = 0.95
"""Share of experiments on identical variants in which no two of them are further apart than the
margin."""
SEEDS_FOR_A_CLAIM = 5
"""With fewer seeds the variance is hardly known, and the margin rests on it."""
TRIALS = 200_000


def chance_margin(losses_VS: np.ndarray) -> float:
    """Returns the largest distance between the means (over seeds) of any two variants that chance
    alone explains, at CONFIDENCE; NaN for a single variant or seed, and where a loss is NaN."""
    variants, seeds = losses_VS.shape
    if min(variants, seeds) < 2:
        return nan
    quantile = studentized_range(variants, degrees_of_freedom(variants, seeds))
    return quantile * residual_std(losses_VS) / sqrt(seeds)


def residual_std(losses_VS: np.ndarray) -> float:
    """Returns the standard deviation of what neither variant nor seed explains, pooled over all."""
    means = losses_VS.mean(1, keepdims=True) + losses_VS.mean(0) - losses_VS.mean()
    squares = np.square(losses_VS - means).sum()
    return sqrt(squares / degrees_of_freedom(*losses_VS.shape))


def degrees_of_freedom(variants: int, seeds: int) -> int:
    """Returns how many independent residuals there are."""
    return (variants - 1) * (seeds - 1)


@cache
def studentized_range(variants: int, degrees: int) -> float:
    """Returns the quantile at CONFIDENCE of the distance from the largest to the smallest of normal
    numbers, one a variant, relative to a standard deviation estimated with so many degrees of
    freedom. It is drawn, always with the same seed: within 0.5 % of published tables."""
    rng = np.random.default_rng(0)
    ranges = np.ptp(rng.standard_normal((TRIALS, variants)), axis=1)
    deviations = np.sqrt(rng.chisquare(degrees, TRIALS) / degrees)
    return float(np.quantile(ranges / deviations, CONFIDENCE))
