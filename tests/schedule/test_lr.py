from dataclasses import replace
from itertools import pairwise

import pytest

from config import Phase, TrainingConfig, Upcycle, tiny
from utils.schedule.lr import lr_at
from utils.schedule.phases import resolve_phases


def resolve(phases, training):
    return resolve_phases(replace(tiny(), phases=phases, training=training))


@pytest.mark.parametrize("warmup_fraction", [0.0, 0.05, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 40, 41])
def test_the_rate_rises_from_above_0_to_its_peak_and_falls_to_its_floor(warmup_fraction, steps):
    training = TrainingConfig(warmup_fraction=warmup_fraction, min_lr_ratio=0.2)
    (phase,) = resolve({"a": Phase(steps=steps, lr=3.0)}, training)
    rates = [lr_at(step, phase, training) for step in range(steps)]
    warmup_steps = round(warmup_fraction * steps)
    rising, falling = rates[:warmup_steps], rates[warmup_steps:]
    assert rising == pytest.approx([3.0 * (step + 1) / warmup_steps for step in range(len(rising))])
    assert min(rates) > 0 and all(0.2 * 3.0 <= rate <= 3.0 for rate in falling)
    assert all(after < before for before, after in pairwise(falling))
    if falling:
        assert falling[0] == 3.0
        assert lr_at(steps, phase, training) == pytest.approx(0.6)


def final_rates(idle="", **settings):
    """Returns the rates at the ends of four phases; the one named `idle` has no steps."""
    peaks = {"a": 4.0, "b": 1.0, "c": 2.0, "d": 0.1}
    phases = {name: Phase(steps=9 * (name != idle), lr=lr) for name, lr in peaks.items()}
    training = TrainingConfig(min_lr_ratio=0.2, **settings)
    rates = {p.name: lr_at(9, p, training) for p in resolve(phases, training)}
    return {name: round(rate, 9) for name, rate in rates.items()}


def test_the_rate_falls_to_the_next_phases_peak_and_to_its_floor_only_at_the_end():
    assert final_rates() == {"a": 1.0, "b": 1.0, "c": 0.4, "d": 0.02}
    floors = {"a": 0.8, "b": 0.2, "c": 0.4, "d": 0.02}
    assert final_rates(decay_to="floor") == floors


def test_a_phase_that_does_not_train_is_passed_over():
    assert final_rates(idle="b")["a"] == 2.0
    assert final_rates(idle="d")["c"] == 0.4


@pytest.mark.parametrize(
    "setting, warms_up", [("carry", True), ("reset", False), ("reset-warmup", True)]
)
def test_every_phase_warms_up_but_one_that_grew_with_a_reset_that_goes_without(setting, warms_up):
    training = TrainingConfig(optimizer_state_on_growth=setting, warmup_fraction=0.5)
    phases = {"a": Phase(steps=8, lr=1.0), "b": Phase(Upcycle(4), steps=8, lr=1.0)}
    first, grown = resolve(phases, training)
    assert lr_at(0, first, training) == 0.25
    assert lr_at(0, grown, training) == (0.25 if warms_up else 1.0)
