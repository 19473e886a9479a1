"""On a device whose costs are those of DeviceCosts, what is foreseen is what is spent."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from config import TrainingConfig, full
from tests.helpers.small_runs import FOUR_PHASES, small_run
from utils.data import ValidWindows
from utils.metrics.forecast import Forecast
from utils.metrics.history import SETTLING_STEPS
from utils.runtime.stopwatch import TIME_KINDS
from utils.schedule.memory import CHECKPOINT_BYTES_PER_PARAM, POINT_BYTES_PER_PARAM
from utils.schedule.phases import resolve_phases, resume_phases

FLOP_S = 1e-9
"""Seconds of an operation on the simulated device."""
STEPS = {f"steps_phase{number}": steps for number, steps in enumerate((70, 1, 60, 12), 1)}
TRAINING = replace(FOUR_PHASES, eval_every=7, **STEPS)
VALID = ValidWindows(torch.zeros(3, 33), torch.zeros(5, 33), 1, 1, 1, 1)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
each_device = pytest.mark.parametrize(
    "device, dtype", [(CPU, torch.float32), (CPU, torch.bfloat16), (CUDA, torch.bfloat16)]
)


@pytest.fixture
def phases(tmp_path):
    return resolve_phases(small_run(tmp_path, TRAINING))


def make_forecast(phases, device=CPU, dtype=torch.float32, training=TRAINING):
    return Forecast(phases, training, VALID, device, dtype)


def simulate(forecast: Forecast, dtype: torch.dtype, dearer: Counter | None = None):
    """Carries a run out on a device that works as `forecast.costs` say, with some kinds of work
    dearer. Returns, by phase and step, what has been spent by kind when the step is done, and what
    the whole run has spent of each phase."""
    costs, training, spent, moments = forecast.costs, forecast.training, Counter(), {}

    def spend(kind: str, seconds: float) -> None:
        assert kind in TIME_KINDS
        spent[kind, phase.number] += seconds * (dearer or {}).get(kind, 1)

    def evaluate(config, tokens: int, factor: float = 1.0) -> None:
        spend("evaluation", FLOP_S * factor * forecast.forward_work(config, tokens))

    fp32_factor = 1.0 if dtype == torch.float32 else costs.fp32_factor
    before = None
    for phase in forecast.phases:
        config, is_last = phase.config, phase is forecast.phases[-1]
        if phase.growth:
            evaluate(before, 3 * 32, fp32_factor)
            probe_tokens = training.probe_sequences * 32
            for model in (before, before, before, config, config):
                check = forecast.forward_work(model, probe_tokens)
                spend("growth", FLOP_S * costs.growth_factor * check)
        if phase.init_checkpoint:
            spend("saving", costs.copy_s * CHECKPOINT_BYTES_PER_PARAM * config.num_params)
        spend("start", costs.start_s * config.n_layers)
        for step in range(phase.steps + 1):
            if step:
                spend("steps", FLOP_S * forecast.step_work(phase))
            moments[phase.number, step] = spent.copy()
            is_end = step == phase.steps
            is_settling = phase.growth and step in SETTLING_STEPS
            if is_end:
                kept = CHECKPOINT_BYTES_PER_PARAM if is_last else POINT_BYTES_PER_PARAM
                spend("saving", costs.copy_s * kept * config.num_params)
            if step % training.eval_every == 0 or is_end or is_settling:
                evaluate(config, 3 * 32)
                if phase.growth and step == 0 and dtype != torch.float32:
                    evaluate(config, 3 * 32, fp32_factor)
            if is_end:
                evaluate(config, 5 * 32)
        spend("samples", costs.sample_s * config.n_layers * training.sample_tokens)
        before = config
    spend("waiting", costs.write_s * CHECKPOINT_BYTES_PER_PARAM * before.num_params)
    return moments, spent


def foresee(forecast, moments, phase, step, by_phases_before=False):
    """Returns what is foreseen after a step, by kind and phase, without what is not there."""
    so_far = Counter()
    for (kind, _), seconds in moments[phase.number, step].items():
        so_far[kind] += seconds
    step_s = None if by_phases_before else FLOP_S * forecast.step_work(phase)
    left = forecast.seconds_left(phase, step, step_s, so_far)
    numbered = zip(range(phase.number, len(forecast.phases) + 1), left, strict=True)
    return {(kind, n): s for n, kinds in numbered for kind, s in kinds.items() if s}


def spent_after(moments, spent, phase, step):
    """Returns what a run spends after a step."""
    done = moments[phase.number, step]
    return {key: seconds - done[key] for key, seconds in spent.items() if seconds > done[key]}


@each_device
def test_what_is_foreseen_in_each_phase_is_what_is_spent(phases, device, dtype):
    forecast = make_forecast(phases, device, dtype)
    moments, spent = simulate(forecast, dtype)
    assert len({number for number, _ in moments}) == 4
    for phase in phases:
        for step in {1, phase.steps // 2, phase.steps} - {0}:
            foreseen = foresee(forecast, moments, phase, step)
            assert foreseen == pytest.approx(spent_after(moments, spent, phase, step), rel=1e-9)
            if phase.number > 1:
                assert foresee(forecast, moments, phase, step, True) == pytest.approx(foreseen)


@each_device
def test_what_was_measured_in_earlier_phases_replaces_what_work_usually_costs(
    phases, device, dtype
):
    forecast = make_forecast(phases, device, dtype)
    dearer = Counter(evaluation=3, growth=5, samples=7, saving=11)
    moments, spent = simulate(forecast, dtype, dearer)
    first, *_, last = phases
    usual = simulate(forecast, dtype)
    expected = spent_after(*usual, first, 1)
    assert foresee(forecast, moments, first, 1) == pytest.approx(expected, rel=1e-9)
    foreseen = foresee(forecast, moments, last, 1)
    assert foreseen == pytest.approx(spent_after(moments, spent, last, 1), rel=1e-9)


def test_what_is_left_falls_with_every_step_until_no_step_is_left(phases):
    forecast = make_forecast(phases)
    for phase in phases:
        work = [forecast.work_after(phase, step) for step in range(phase.steps + 1)]
        steps = [kinds["steps"] for kinds in work]
        assert steps == sorted(set(steps), reverse=True) and steps[-1] == 0
        evaluations = [kinds["evaluation"] for kinds in work]
        assert evaluations == sorted(evaluations, reverse=True)
        assert evaluations[-1] == forecast.forward_work(phase.config, 8 * 32)


def test_a_run_that_goes_on_foresees_what_an_undisturbed_one_does(phases):
    whole = make_forecast(phases)
    moments, _ = simulate(whole, torch.float32)
    phase = phases[2]
    resumed = resume_phases(phases, phase.number, 20, phase.first_token, phase.tokens_at(20))
    again = make_forecast(resumed)
    expected = foresee(whole, moments, phase, 30)
    assert foresee(again, moments, resumed[2], 30) == pytest.approx(expected)


def test_the_first_phase_may_grow_out_of_a_model_that_is_not_known(tmp_path):
    run = small_run(tmp_path, TrainingConfig())
    phases = {"moe": small_run(tmp_path, TRAINING).schedule["moe"]}
    (phase,) = resolve_phases(replace(run, phases=phases))
    forecast = make_forecast([phase], training=run.training)
    assert "growth" not in forecast.phase_work(phase)
    (left,) = forecast.seconds_left(phase, 0, 1.0, {})
    assert left["steps"] == pytest.approx(phase.steps)


def test_a_phase_that_does_not_grow_may_follow_one_that_did(tmp_path):
    run = small_run(tmp_path, TrainingConfig())
    schedule = small_run(tmp_path, TRAINING).schedule
    last = replace(schedule["moe"], growth=None, checkpoint="last.pt", init_checkpoint="")
    phases = {"dense": schedule["dense"], "moe": schedule["moe"], "last": last}
    phases = resolve_phases(replace(run, phases=phases))
    forecast = make_forecast(phases, training=run.training)
    left = forecast.seconds_left(phases[-1], 0, 1.0, dict.fromkeys(TIME_KINDS, 1.0))
    assert len(left) == 1 and left[0]["steps"] == pytest.approx(phases[-1].steps)


def test_where_the_last_phase_alone_is_trained_the_others_tell_nothing(phases):
    last = phases[-1]
    forecast = Forecast(phases, TRAINING, VALID, CPU, torch.float32, counted_from=last.number)
    usual = make_forecast(phases[:1]).rates(phases[0], 1, 1.0, {})
    rates = forecast.rates(last, 1, forecast.step_work(last), dict.fromkeys(TIME_KINDS, 99.0))
    assert rates["steps"] == 1 and rates["samples"] == usual["samples"]


@pytest.mark.parametrize(
    "batch, milliseconds", [(None, (3.20, 6.90, 13.7, 16.1)), (64, (16.4, 26.0, 69.8, 85.5))]
)
def test_the_steps_of_an_h100_are_foreseen_from_those_of_the_first_phase(batch, milliseconds):
    """Seconds of docs/performance.md, at the preset's batches and at 64 sequences."""
    run = full()
    phases = resolve_phases(replace(run, model=replace(run.model, vocab_size=50_257)))
    phases = [replace(phase, batch_size=batch or phase.batch_size) for phase in phases]
    forecast = make_forecast(phases, CUDA, torch.bfloat16, run.training)
    works = [forecast.step_work(phase) for phase in phases]
    foreseen = [milliseconds[0] * work / works[0] for work in works]
    assert foreseen == pytest.approx(milliseconds, rel=0.15)
