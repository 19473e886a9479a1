"""The training speed in the history, on a clock that the test moves."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from config import Phase
from tests.helpers.small_runs import MODEL, TRAINING
from train import main
from utils.checkpoint.resume import ResumeCheckpointer
from utils.metrics import throughput
from utils.metrics.history import HISTORY_FILE, read_history, select_events
from utils.plot.live import LivePlot
from utils.runtime.signals import Stopped
from utils.training import phase, reporter
from utils.training.context import RunContext

BATCH_SIZE = 4
TOKENS_PER_S = [BATCH_SIZE * MODEL.seq_len] * 4
"""What a run of 7 steps has to record, each of which takes a second."""


@pytest.fixture(params=["the device computes at once", "the device lags behind"])
def clock(request, monkeypatch):
    """A clock that every training step moves by 1 s, when it is called or when somebody waits for
    the device, and all else that a phase does by 1000 s."""
    clock = SimpleNamespace(now=0.0, pending=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(throughput, "time", clock)

    def wait():
        clock.now, clock.pending = clock.now + clock.pending, 0.0

    def preceded(before, call):
        def both(*args, **kwargs):
            before()
            return call(*args, **kwargs)

        return both

    def begin_step():
        clock.pending += 1.0
        if request.param == "the device computes at once":
            wait()

    def take_long():
        clock.now += 1000.0

    make_train_step = phase.make_train_step
    monkeypatch.setattr(
        phase, "make_train_step", lambda *args: preceded(begin_step, make_train_step(*args))
    )
    for before, owner, name in (
        (wait, throughput, "synchronize"),
        (wait, throughput.MetricAccumulator, "check"),
        (wait, throughput.MetricAccumulator, "read"),
        (take_long, reporter, "evaluate"),
        (take_long, ResumeCheckpointer, "keep"),
        (take_long, LivePlot, "update"),
        (take_long, RunContext, "record"),
    ):
        monkeypatch.setattr(owner, name, preceded(before, getattr(owner, name)))
    return clock


@pytest.fixture
def run(base_run, tmp_path):
    phases = {"dense": Phase(steps=7, batch_size=BATCH_SIZE)}
    training = replace(TRAINING, checkpoint_every="1000min")
    return replace(base_run, training=training, phases=phases, out=tmp_path / "run")


def speeds(run):
    steps = select_events(read_history(run.out / HISTORY_FILE), "step")
    return [event["tokens_per_s"] for event in steps]


@pytest.mark.parametrize("checkpoint_every", ["1", "1000min"])
def test_evaluating_saving_drawing_and_tracking_do_not_count_as_training(
    clock, run, checkpoint_every
):
    main(replace(run, training=replace(run.training, checkpoint_every=checkpoint_every)))
    assert clock.now > 10_000
    assert speeds(run) == TOKENS_PER_S


def test_a_run_that_is_stopped_while_it_evaluates_keeps_the_time_of_its_steps(
    clock, run, monkeypatch
):
    evaluate, calls = reporter.evaluate, []

    def evaluate_once(*args):
        calls.append(args)
        if len(calls) == 2:  # at step 3, of which nothing is logged yet
            clock.now += 1000.0
            raise Stopped(15)
        return evaluate(*args)

    monkeypatch.setattr(reporter, "evaluate", evaluate_once)
    with pytest.raises(Stopped):
        main(run)
    assert len(speeds(run)) == 1
    main(replace(run, resume=True))
    assert speeds(run) == TOKENS_PER_S
