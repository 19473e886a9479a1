"""A run that is killed or stopped, at any moment, ends as if nothing had happened."""

import errno
import os
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace

import pytest

from tests.helpers.killed_runs import (
    MAX_SECONDS,
    arm,
    finish_and_compare,
    read_outcome,
    read_output,
    resume_points_of,
    split_moments,
    wait_for_exit,
)
from train import main
from utils.checkpoint.resume import KEPT_POINTS
from utils.metrics.history import HISTORY_FILE, read_history, time_spent
from utils.runtime.atomic_io import PART_SUFFIX, load_tensors
from utils.runtime.signals import Stopped
from utils.runtime.stopwatch import TIME_KINDS
from utils.training import step

FULL, BROKEN = ((number, os.strerror(number)) for number in (errno.ENOSPC, errno.EIO))
"""What a full disk and a broken one say."""
KILLS = {
    "from the first step to the third point": """
        before CONTEXT.RunContext.record_start 1, before STEP 1, before torch.save 1,
        amid WRITE 3, after torch.save 1, before pathlib.Path.replace 1,
        after pathlib.Path.replace 1, after RESUME.save_tensors 2, before RESUME.resume_points 4""",
    "from the copy of a point to the sweep of an older one": """
        before BACKGROUND.submit 1, after BACKGROUND.copy 1, amid WRITE 1, amid WRITE 220,
        amid WRITE 438, after RESUME.save_tensors 1, after BACKGROUND.submit 1,
        before RESUME.resume_points 4, before SYNC_FOLDER 2,
        before pathlib.Path.unlink 6, after pathlib.Path.unlink 5""",
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
MODES = {
    "beside training": {},
    "beside, on a slow disk": {"steps_per_write": 2},
    "in place": {"in_place": True},
}
"""How a run writes its files."""
FAULTS = """
    before utils.metrics.history.History.sync 1, before pathlib.Path.replace 1,
    before SYNC_FOLDER 1, before pathlib.Path.replace 1,
    before utils.metrics.history.History.sync 2, before RESUME.save_checkpoint 1,
    before SYNC_FOLDER 1, before pathlib.Path.replace 2, after pathlib.Path.replace 2,
    before PHASE.save_checkpoint 1, before SYNC_FOLDER 1, before RESUME.resume_points 3,
    before pathlib.Path.replace 3, after pathlib.Path.replace 3"""
"""Moments at which a disk fails."""
ACTIVITIES = """
    prepare_corpus keep wait plot sample_stories evaluate grow train_step build_optimizer
    latest_point report check_memory record_start train_phase prepare_run main save_tensors
    _worker"""
"""Functions on the stack that tell, the innermost first, what a run was doing; the last two are
those of the threads that write and that add up a file."""


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


def train_with(run, **changes):
    """The run with other settings of its training."""
    return replace(run, training=replace(run.training, **changes))


def last_step(run):
    """The last step, with its phase, that a run's history tells of."""
    steps = [event for event in read_history(run.out / HISTORY_FILE) if "step" in event]
    return steps[-1]["phase"], steps[-1]["step"]


def test_a_run_killed_during_a_write_that_it_trains_beside_ends_as_if_it_never_had_been(
    start_run, run, undisturbed
):
    """The history tells that steps were taken since the copy was made."""
    run = train_with(run, checkpoint_every="5")
    amounts = ["amid WRITE 1", "amid WRITE 200", "amid WRITE 430", "after RESUME.save_tensors 1"]
    for phase, moments in ((1, amounts), (2, ["after RESUME.save_checkpoint 2", *amounts])):
        for number, moment in enumerate(moments):
            (moment,) = split_moments(moment)
            options = replace(run, resume=phase > 1 or number > 0), (moment, signal.SIGKILL)
            process = start_run(*options, steps_per_write=3)
            assert wait_for_exit(process) == -signal.SIGKILL, moment
            assert last_step(run) >= (phase, 6), moment
    finish_and_compare(start_run, run, undisturbed)


def test_the_time_before_a_kill_counts_in_what_a_run_is_said_to_have_taken(
    start_run, run, undisturbed
):
    (moment,) = split_moments("before STEP 14")
    process = start_run(run, (moment, signal.SIGKILL), in_place=True)
    assert wait_for_exit(process) == -signal.SIGKILL
    before = load_tensors(resume_points_of(run)[-1])["seconds"]
    assert all(before[kind] > 0 for kind in TIME_KINDS.keys() - {"waiting"})
    finish_and_compare(start_run, run, undisturbed)
    events = read_history(run.out / HISTORY_FILE)
    spent = time_spent(events[-1])
    assert all(spent[kind] > before[kind] for kind in TIME_KINDS)
    assert events[-1]["wall_s"] > sum(before.values()) > events[0]["wall_s"]


def last_activity(run):
    """The phase that a killed run was in, what it was doing, and whether it was amid a point or a
    checkpoint."""
    functions = [line.split()[-1] for line in read_output(run, "stack").splitlines()]
    history = run.out / HISTORY_FILE
    events = read_history(history) if history.exists() else []
    phase = max((event.get("phase", 0) for event in events), default=0)
    activity = next((name for name in ACTIVITIES.split() if name in functions), "start")
    return phase, activity, any(run.out.rglob(f".*.pt.*{PART_SUFFIX}"))


def kill_at_random(start_run, run, undisturbed, chance, times, **options):
    """Kills a run at random moments, then finishes it. Returns how often it was doing what."""
    activities = Counter()
    for _ in range(times):
        timer = undisturbed.cpu_seconds * chance.uniform(0.02, 0.25), signal.SIGPROF
        process = start_run(replace(run, resume=run.out.exists()), timer=timer, **options)
        code = wait_for_exit(process)
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
        mode = list(MODES)[runs % len(MODES)]
        kills = kill_at_random(start_run, other, undisturbed, chance, 4, **MODES[mode])
        activities += Counter({(mode, *kill): times for kill, times in kills.items()})
    amid = Counter(mode for mode, *_, is_amid in activities.elements() if is_amid)
    assert amid.keys() == MODES.keys(), "no kill amid a file"
    with capsys.disabled():
        print(f"\n{activities.total()} kills of {runs} runs, {dict(amid)} amid a file; by phase:")
        for (mode, phase, activity, is_amid), times in sorted(activities.items()):
            print(f"{phase}  {mode:<23}{activity:<16}{'amid a file' * is_amid:<12}{times:>4}")


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


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_disk_that_fails_stops_the_run_with_one_error_and_nothing_is_damaged(
    mode, start_run, run, undisturbed
):
    run = train_with(run, checkpoint_every="4")
    for number, moment in enumerate(split_moments(FAULTS)):
        fault = OSError(*(FULL if number % 2 else BROKEN))
        process = start_run(replace(run, resume=number > 0), (moment, fault), **mode)
        assert wait_for_exit(process) == 1, moment
        error, points = read_output(run, "stderr"), resume_points_of(run)
        assert error.startswith(f"stopped: {fault}; ") and error.count("\n") == 1, moment
        assert (f"{points[-1]} is kept: " if points else "nothing was kept yet") in error, moment
        for path in [*points, *run.out.glob("*.pt")]:
            assert load_tensors(path), moment
        assert not list(run.out.rglob(f"*{PART_SUFFIX}")), moment
    finish_and_compare(start_run, run, undisturbed)


@pytest.mark.parametrize("in_place", [False, True], ids=["beside training", "in place"])
def test_a_signal_between_the_two_files_of_a_phases_end_keeps_both_and_writes_them_once(
    in_place, start_run, run, undisturbed
):
    run = train_with(run, checkpoint_every="60min")
    moments = "before RESUME.save_checkpoint 1, after RESUME.save_checkpoint 1"
    (again,) = split_moments("before RESUME.save_tensors 2")
    for moment in split_moments(moments):
        armed = (moment, signal.SIGTERM), (again, signal.SIGKILL)
        process = start_run(replace(run, overwrite=True), *armed, in_place=in_place)
        assert wait_for_exit(process) == 128 + signal.SIGTERM
        (point,) = resume_points_of(run)
        assert point.name == "phase001-step00000009.pt", moment
    finish_and_compare(start_run, run, undisturbed)


@pytest.fixture(scope="module")
def begun_run(undisturbed_run, start_run):
    """A run that has kept one point, that of step 4."""
    out = undisturbed_run.out.with_name("barely-begun")
    run = train_with(replace(undisturbed_run, out=out), checkpoint_every="4")
    (moment,) = split_moments("after RESUME.save_tensors 1")
    process = start_run(run, (moment, signal.SIGKILL))
    assert wait_for_exit(process) == -signal.SIGKILL
    return run


@pytest.mark.parametrize(
    "first, moment, event, code, steps",
    [
        (signal.SIGTERM, "", 0, 143, (8, 9)),
        (signal.SIGUSR1, "amid WRITE 200", signal.SIGTERM, 138, (8, 9)),
        (signal.SIGTERM, "amid WRITE 200", signal.SIGTERM, 143, (4,)),
        (signal.SIGTERM, "after RESUME.save_tensors 1", signal.SIGINT, 130, (4, 8)),
        (signal.SIGTERM, "before pathlib.Path.replace 1", OSError(*FULL), 1, (4,)),
    ],
    ids=["one signal", "a later one", "a second one", "a second one between", "a full disk"],
)
def test_a_signal_during_a_slow_write_waits_for_it_and_keeps_a_fresh_point(
    first, moment, event, code, steps, begun_run, start_run, run, undisturbed
):
    """The signal comes in the last step of phase 1, while the point of step 8 is written. The
    process leaves at once where a second one comes that insists."""
    run = replace(begun_run, out=run.out)
    shutil.copytree(begun_run.out, run.out)
    (stop,) = split_moments("before STEP 5")
    later = [(name, event) for name in split_moments(moment) if name]
    process = start_run(replace(run, resume=True), (stop, first), *later, steps_per_write=9)
    assert wait_for_exit(process) == code
    points = resume_points_of(run)
    assert [path.name for path in points] == [f"phase001-step{n:08d}.pt" for n in steps]
    assert all(map(load_tensors, points))
    if code == 1:
        error = read_output(run, "stderr")
        assert error.startswith(f"stopped: {event}; {points[-1]} is kept: ")
        assert error.count("\n") == 1
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
        arm(moment, signal.SIGINT)
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
    process = start_run(run, (pause, signal.SIGSTOP), in_place=True)  # no write is stopped with it
    deadline = time.monotonic() + MAX_SECONDS
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
