import pytest
import torch

from utils.metrics.throughput import (
    STEP_METRICS,
    TIMED_STEPS,
    AccumulatorState,
    MetricAccumulator,
    StepTimer,
)
from utils.runtime.errors import NotFinite
from utils.runtime.stopwatch import Stopwatch

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


def test_a_step_is_timed_once_after_a_warm_up_and_without_what_lies_between_steps():
    clock_s = 0.0
    stopwatch = Stopwatch(0.0, lambda: clock_s)
    timer = StepTimer(CPU, stopwatch)
    measured = []
    for step in range(1, 30):
        with stopwatch.counting("steps"):
            clock_s += 90.0 if step <= timer.skipped_steps else 0.25
            with stopwatch.counting("evaluation"):
                clock_s += 7.0
            measured.append(timer.count())
    last = timer.skipped_steps + TIMED_STEPS
    assert measured == [None] * (last - 1) + [0.25] + [None] * (29 - last)
