import pytest
import torch

from config import tiny
from utils.metrics.throughput import (
    STEP_METRICS,
    AccumulatorState,
    EtaEstimator,
    MetricAccumulator,
)
from utils.runtime.errors import NotFinite
from utils.schedule.phases import resolve_phases

CPU = torch.device("cpu")
STEPS = [torch.tensor([3.0, 2.0, 0.5, 1.0]), torch.tensor([2.0, 4.0, 1.5, 0.0])]
MEANS = dict(zip(STEP_METRICS, [2.5, 3.0, 1.0, 0.5], strict=True))


def accumulator(state=None):
    return MetricAccumulator(CPU, tokens_per_step=8, state=state or AccumulatorState.empty())


def test_a_reading_holds_the_means_since_the_last_one():
    metrics = accumulator()
    metrics.add(torch.ones(4))
    metrics.read("here")
    for step in STEPS:
        metrics.add(step)
    values = metrics.read("here")
    assert {name: values[name] for name in STEP_METRICS} == MEANS
    assert values["tokens_per_s"] > 0


def test_a_state_that_was_saved_goes_on_with_its_sums_and_its_time():
    metrics = accumulator(AccumulatorState(STEPS[0], steps=1, tokens=30, seconds=100.0))
    metrics.add(STEPS[1])
    sums, steps, tokens, seconds = metrics.state()
    assert torch.equal(sums, STEPS[0] + STEPS[1])
    assert (steps, tokens) == (2, 38) and seconds >= 100
    values = metrics.read("here")
    assert {name: values[name] for name in STEP_METRICS} == MEANS
    assert 0 < values["tokens_per_s"] <= 38 / 100


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_metric_that_is_not_finite_stops_the_run_by_its_name_and_place(bad):
    metrics = accumulator()
    metrics.add(torch.tensor([1.0, 1.0, bad, 1.0]))
    for ask in (metrics.check, metrics.read):
        with pytest.raises(NotFinite, match=rf"^phase 1, step 7: z_loss is {bad}"):
            ask("phase 1, step 7")


def test_the_time_to_come_is_estimated_once_and_names_every_phase():
    estimator = EtaEstimator(resolve_phases(tiny()), CPU)
    lines = [line for step in range(1, 20) if (line := estimator.line_after(step))]
    assert len(lines) == 1
    assert all(phase in lines[0] for phase in ("dense", "moe", "wide", "deep"))
