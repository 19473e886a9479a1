"""A run that is killed or stopped, at any moment, ends as if nothing had happened."""

import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace

import pytest

from tests.helpers.killed_runs import (
    MAX_SECONDS,
    arm_signal,
    finish_and_compare,
    read_outcome,
    read_output,
    resume_points_of,
    split_moments,
    wait_for_exit,
)
from train import main
from utils.checkpoint.resume import KEPT_POINTS
from utils.metrics.history import HISTORY_FILE, read_history
from utils.runtime.atomic_io import load_tensors
from utils.runtime.signals import Stopped
from utils.training import step

KILLS = {
    "from the first step to the third point": """
        before CONTEXT.RunContext.record_start 1, before STEP 1, before torch.save 1,
        amid WRITE 3, after torch.save 1, before pathlib.Path.replace 1,
        after pathlib.Path.replace 1, after RESUME.save_tensors 2, before RESUME.resume_points 4""",
    "while it grows": """
        before PHASE.grow 1, after PHASE.grow 1, after PHASE.save_checkpoint 1,
        after PHASE.grow_and_verify 1, after PHASE.grow 2, before RESUME.save_checkpoint 1,
        before PHASE.grow 1, after PHASE.grow 1""",
    "between phases": """
        before PHASE.sample_stories 1, after PHASE.sample_stories 1,
        before RESUME.save_checkpoint 1, before pathlib.Path.replace 2,
        after RESUME.save_checkpoint 1, after PHASE.train_phase 1, after PHASE.save_phase 1,
        before PHASE.build_optimizer 2, after PHASE.save_phase 1, after PHASE.save_phase 1""",
    "while it reports, and at the end": """
        before REPORTER.evaluate 3, after REPORTER.evaluate 3,
        after utils.metrics.history.History.__call__ 4, before RESUME.save_checkpoint 1,
        amid WRITE 9, before CONTEXT.plot 1, after CONTEXT.plot 1,
        before CONTEXT.remove_resume_points 1, after CONTEXT.remove_resume_points 1""",
    "while it draws": """
        before utils.plot.live.plot 2, amid WRITE 1, after utils.plot.live.plot 3,
        before matplotlib.figure.Figure.savefig 1, after matplotlib.figure.Figure.savefig 2""",
}
STOPS = """
    before utils.text.tokenizer.learn_tokenizer 1, before utils.data.write_tokens 1,
    after utils.text.fast_encode.make_encoder 1, before CONTEXT.RunContext.record_start 1,
    before STEP 4, after STEP 3, after STEP 2, before REPORTER.evaluate 2,
    before utils.plot.live.plot 1, before WRITE 7, after WRITE 3, after torch.save 1,
    before PHASE.write_stories 2, before PHASE.grow 1, after PHASE.grow 1,
    before utils.metrics.history.History.__call__ 5, before RESUME.save_checkpoint 1,
    before CONTEXT.plot 1"""
ACTIVITIES = """
    prepare_corpus keep wait plot sample_stories evaluate grow train_step build_optimizer
    latest_point report check_memory record_start train_phase prepare_run main"""
"""Functions on the stack that tell, the innermost first, what a run was doing."""


@pytest.mark.parametrize("in_place", [False, True], ids=["beside training", "in place"])
@pytest.mark.parametrize("moments", KILLS.values(), ids=KILLS)
def test_a_run_killed_again_and_again_ends_as_if_it_never_had_been(
    moments, in_place, start_run, run, undisturbed
):
    for number, moment in enumerate(split_moments(moments)):
        options = replace(run, resume=number > 0), (moment, signal.SIGKILL)
        process = start_run(*options, in_place=in_place)
        assert wait_for_exit(process) == -signal.SIGKILL, moment
        assert len(resume_points_of(run)) <= KEPT_POINTS + 1
    finish_and_compare(start_run, run, undisturbed)


def test_a_run_that_goes_on_with_other_settings_keeps_them_wherever_it_is_killed_again(
    start_run, run
):
    (moment,) = split_moments("before STEP 14")  # a point was kept after step 4 of phase 2
    process = start_run(run, (moment, signal.SIGKILL), in_place=True)
    assert wait_for_exit(process) == -signal.SIGKILL
    settings = {"lr_phase2": 1e-3, "batch_size": 3, "steps_phase2": 8, "weight_decay": 0.5}
    changed = replace(run, training=replace(run.training, **settings), resume=True)
    unkilled = replace(changed, out=run.out.with_name("unkilled"))
    shutil.copytree(run.out, unkilled.out)
    assert wait_for_exit(start_run(unkilled)) == 0
    moments = """
        before RESUME.save_tensors 1, amid WRITE 3, after RESUME.save_tensors 1, before STEP 1,
        before STEP 2, before RESUME.save_tensors 1, after PHASE.grow 1, before STEP 3"""
    for moment in split_moments(moments):
        process = start_run(changed, (moment, signal.SIGKILL), in_place=True)
        assert wait_for_exit(process) == -signal.SIGKILL, moment
    finish_and_compare(start_run, changed, read_outcome(unkilled))
    events = read_history(run.out / HISTORY_FILE)
    changes = [event for event in events if event["event"] == "change"]
    assert {(event["phase"], event["step"]) for event in changes} == {(2, 4)}
    assert {event["setting"]: event["new"] for event in changes} == {
        f"training.{name}": value for name, value in settings.items()
    }


def last_activity(run):
    """The phase that a killed run was in, and what it was doing."""
    functions = [line.split()[-1] for line in read_output(run, "stack").splitlines()]
    history = run.out / HISTORY_FILE
    events = read_history(history) if history.exists() else []
    phase = max((event.get("phase", 0) for event in events), default=0)
    return phase, next((name for name in ACTIVITIES.split() if name in functions), "start")


def kill_at_random(start_run, run, undisturbed, chance, times):
    """Kills a run at random moments, then finishes it. Returns how often it was doing what."""
    activities = Counter()
    for _ in range(times):
        timer = undisturbed.cpu_seconds * chance.uniform(0.02, 0.25), signal.SIGPROF
        code = wait_for_exit(start_run(replace(run, resume=run.out.exists()), timer=timer))
        assert code in (0, -signal.SIGPROF)
        if code:
            activities[last_activity(run)] += 1
    finish_and_compare(start_run, run, undisturbed)
    return activities


@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_at_random_moments_ends_as_if_it_never_had_been(
    seed, start_run, run, undisturbed
):
    kills = kill_at_random(start_run, run, undisturbed, random.Random(seed), 5)
    assert kills.total() >= 2


@pytest.mark.long
def test_two_hundred_kills_at_random_moments_leave_no_trace(start_run, run, undisturbed, capsys):
    activities, chance, runs = Counter(), random.Random(0), 0
    while activities.total() < 200:
        runs += 1
        assert runs <= 200, "most runs end before they are killed"
        other = replace(run, out=run.out.with_name(f"run{runs}"))
        activities += kill_at_random(start_run, other, undisturbed, chance, 4)
    with capsys.disabled():
        print(f"\n{activities.total()} kills of {runs} runs, by phase:")
        for (phase, activity), times in sorted(activities.items()):
            print(f"{phase}  {activity:<16}{times:>4}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_a_signal_stops_says_how_to_go_on_and_does(number, start_run, run, undisturbed):
    uncached = replace(run.data, cache=run.out.with_name("uncached"))
    for moment in split_moments(STOPS):
        process = start_run(replace(run, data=uncached, resume=run.out.exists()), (moment, number))
        assert wait_for_exit(process) == 128 + number, moment
        error = read_output(run, "stderr")
        assert error.startswith(f"stopped by {number.name}; ") and error.count("\n") == 1, moment
        assert ("--resume goes on" if resume_points_of(run) else "run the same") in error, moment
    finish_and_compare(start_run, run, undisturbed)


@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_signals_stop_at_random_moments_goes_on(seed, start_run, run, undisturbed):
    chance, codes = random.Random(seed), []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        timer = undisturbed.cpu_seconds * chance.uniform(0.02, 0.25), number
        code = wait_for_exit(start_run(replace(run, resume=run.out.exists()), timer=timer))
        codes.append(code)
        assert code in (0, 128 + number)
    assert codes[0] == 128 + signal.SIGTERM
    finish_and_compare(start_run, run, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_whatever_signal_asks_a_run_to_stop_a_point_is_kept(number, start_run, run, undisturbed):
    (moment,) = split_moments("before STEP 4")
    assert wait_for_exit(start_run(run, (moment, number))) == 128 + number
    assert [path.name for path in resume_points_of(run)][-1] == "phase001-step00000004.pt"
    assert read_output(run, "stderr").startswith(f"stopped by {number.name}; ")
    finish_and_compare(start_run, run, undisturbed)


def test_a_notebooks_interrupt_keeps_a_point(run, undisturbed, start_run):
    """Nobody but the run itself handles signals there."""
    (moment,) = split_moments("before STEP 4")
    before = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "train_step", step.train_step)  # undoes what is armed
        arm_signal(moment, signal.SIGINT)
        with pytest.raises(Stopped, match=r"stopped by SIGINT; .*--resume goes on from there"):
            main(run)
    assert signal.getsignal(signal.SIGINT) == before
    assert [path.name for path in resume_points_of(run)][-1] == "phase001-step00000004.pt"
    finish_and_compare(start_run, run, undisturbed)


def test_a_second_ctrl_c_leaves_at_once_with_the_old_point_intact(start_run, run, undisturbed):
    (kill, first, second) = split_moments("after STEP 3, before STEP 2, after torch.save 1")
    process = start_run(run, (kill, signal.SIGKILL), in_place=True)
    assert wait_for_exit(process) == -signal.SIGKILL
    (old,) = resume_points_of(run)
    interrupts = (first, signal.SIGINT), (second, signal.SIGINT)
    process = start_run(replace(run, resume=True), *interrupts)
    assert wait_for_exit(process) == 128 + signal.SIGINT
    assert resume_points_of(run) == [old] and load_tensors(old)
    finish_and_compare(start_run, run, undisturbed)


@pytest.mark.parametrize(
    "first, second",
    [(signal.SIGHUP, signal.SIGHUP), (signal.SIGUSR1, signal.SIGTERM)],
    ids=["a terminal that is closed", "a job's time limit"],
)
def test_a_point_that_is_being_written_is_kept_though_another_signal_comes(
    first, second, start_run, run
):
    asks, goes_on = split_moments("before STEP 4, after torch.save 2")
    assert wait_for_exit(start_run(run, (asks, first), (goes_on, second))) == 128 + first
    point = resume_points_of(run)[-1]
    assert point.name == "phase001-step00000004.pt" and load_tensors(point)
    assert read_output(run, "stderr").startswith(f"stopped by {first.name}; ")


def test_a_folder_belongs_to_one_live_run_and_is_free_once_that_is_killed(
    start_run, run, undisturbed
):
    (pause,) = split_moments("after STEP 4")
    process, deadline = start_run(run, (pause, signal.SIGSTOP)), time.monotonic() + MAX_SECONDS
    try:
        while not resume_points_of(run) and time.monotonic() < deadline:
            time.sleep(0.01)
        other = replace(run, out=run.out / ".." / "run", resume=True)
        assert wait_for_exit(start_run(other)) == 2
        assert "is being written by another run" in read_output(run, "stderr")
    finally:
        process.kill()
    assert wait_for_exit(process) == -signal.SIGKILL
    finish_and_compare(start_run, run, undisturbed)
