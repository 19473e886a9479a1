"""What is kept is written beside the training, and comes to the same as if training had waited."""

import io
import os
import re
import signal
import sys
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from itertools import count
from math import inf
from threading import Event

import pytest
import torch

from tests.helpers.damage import capture_command
from tests.helpers.killed_runs import (
    finish_and_compare,
    read_outcome,
    read_output,
    resume_points_of,
    slow_disk_down,
    split_moments,
    wait_for_exit,
)
from tests.helpers.small_models import MOE, random_train_state
from tests.helpers.small_runs import comparable_history
from train import main
from utils.checkpoint import background, model, resume
from utils.checkpoint.background import BackgroundWriter
from utils.checkpoint.model import load_checkpoint
from utils.checkpoint.run_dir import is_finished
from utils.metrics.history import HISTORY_FILE
from utils.runtime import atomic_io
from utils.runtime.atomic_io import atomic_file, load_tensors
from utils.runtime.errors import NotFinite, RunStopped
from utils.runtime.signals import Stopped, raise_on_signals, signal_state
from utils.runtime.stopwatch import Stopwatch
from utils.training import context


def test_one_write_is_in_flight_at_a_time_and_the_caller_need_not_wait():
    writer, goes_on, order = BackgroundWriter(), Event(), []
    writer.submit(lambda: (goes_on.wait(9), order.append(1)), {})
    assert order == []
    goes_on.set()
    writer.submit(lambda: order.append(2), {})
    assert order[0] == 1
    writer.wait()
    assert order == [1, 2]


def fail():
    raise OSError("the disk is full")


@pytest.mark.parametrize("call", ["check", "wait", "submit", "copy"])
def test_what_stops_a_write_is_raised_by_the_next_call_once(call):
    writer = BackgroundWriter()
    writer.submit(fail, {})
    while writer.in_flight is not None and not writer.in_flight.done():
        time.sleep(0.001)
    calls = {
        "check": writer.check,
        "wait": writer.wait,
        "submit": lambda: writer.submit(lambda: None, {}),
        "copy": lambda: writer.copy(random_train_state(MOE)),
    }
    with pytest.raises(OSError, match="the disk is full"):
        calls[call]()
    writer.wait()


@pytest.fixture
def signals():
    """Signals stop what a test does, as they stop a run."""
    with raise_on_signals():
        yield
    signal_state.received = None


def test_an_error_of_a_write_is_not_lost_to_a_signal_at_the_same_moment(signals, monkeypatch):
    result = Future.result

    def result_with_signal(future):
        os.kill(os.getpid(), signal.SIGTERM)
        return result(future)

    writer = BackgroundWriter()
    writer.submit(fail, {})
    monkeypatch.setattr(Future, "result", result_with_signal)
    with pytest.raises(OSError, match="the disk is full"):
        writer.wait()


def test_a_signal_as_a_write_begins_does_not_lose_sight_of_it(signals, monkeypatch):
    start = background.start_thread

    def start_with_signal(call):
        started = start(call)
        os.kill(os.getpid(), signal.SIGTERM)
        return started

    monkeypatch.setattr(background, "start_thread", start_with_signal)
    writer, goes_on, order = BackgroundWriter(), Event(), []
    with pytest.raises(Stopped):
        writer.submit(lambda: (goes_on.wait(9), order.append(1)), {})
    goes_on.set()
    writer.wait()
    assert order == [1]


def test_a_signal_that_comes_as_an_error_ends_a_run_cuts_no_write_short(signals, monkeypatch):
    wait = background.wait_interruptibly

    def wait_with_signal(result, tick):
        os.kill(os.getpid(), signal.SIGTERM)
        goes_on.set()
        wait(result, tick)

    monkeypatch.setattr(background, "wait_interruptibly", wait_with_signal)
    writer, goes_on, order = BackgroundWriter(), Event(), []
    with pytest.raises(RunStopped, match=r"^the loss is nan$"), writer.finished():
        writer.submit(lambda: (goes_on.wait(9), order.append(1)), {})
        raise RunStopped("the loss is nan")
    assert order == [1]


def test_a_signal_in_the_last_wait_cuts_no_write_short(signals, monkeypatch):
    wait = background.wait_interruptibly

    def wait_with_signal(result, tick):
        monkeypatch.setattr(background, "wait_interruptibly", wait)
        goes_on.set()
        os.kill(os.getpid(), signal.SIGTERM)
        wait(result, tick)

    monkeypatch.setattr(background, "wait_interruptibly", wait_with_signal)
    writer, goes_on, order = BackgroundWriter(), Event(), []
    with pytest.raises(Stopped), writer.finished():
        writer.submit(lambda: (goes_on.wait(9), time.sleep(0.1), order.append(1)), {})
    assert order == [1]


def test_a_run_that_an_error_and_its_last_write_stop_tells_of_both():
    writer = BackgroundWriter()
    with pytest.raises(NotFinite, match=r"^the loss is nan; the disk is full$"), writer.finished():
        writer.submit(fail, {})
        raise NotFinite("the loss is nan")


@pytest.mark.parametrize("stop", [Stopped(signal.SIGTERM), OSError("another")])
def test_an_error_of_the_last_write_is_told_whatever_ends_a_run(stop):
    writer = BackgroundWriter()
    with pytest.raises(OSError, match=r"^the disk is full$"), writer.finished():
        writer.submit(fail, {})
        raise stop


def open_screen(monkeypatch):
    """Makes a terminal stderr, which shows bars soon. Returns what holds all that is written."""
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(background, "BAR_DELAY_S", 0.05)
    return screen


def test_who_waits_for_a_slow_write_sees_its_files_and_how_many_bytes_are_there(
    monkeypatch, tmp_path
):
    screen = open_screen(monkeypatch)
    one, other = tmp_path / "one.pt", tmp_path / "other.pt"

    def write():
        one.write_bytes(bytes(5000))
        with atomic_file(other) as file:
            file.write(bytes(2500))
            file.flush()
            deadline = time.monotonic() + 20
            while "65%" not in screen.getvalue() and time.monotonic() < deadline:
                time.sleep(0.01)

    writer = BackgroundWriter()
    writer.submit(write, {one: 4000, other: 6000})  # a file may be larger than was thought
    writer.wait()
    shown = screen.getvalue()
    assert "writing one.pt, other.pt:  65%" in shown and "6.50k/10.0k [" in shown
    assert re.fullmatch(r".*\r *\r", shown, re.S)  # the line is free again


def test_who_need_not_wait_for_a_write_sees_no_bar(monkeypatch, tmp_path):
    screen = open_screen(monkeypatch)
    writer = BackgroundWriter()
    for _ in range(3):
        writer.submit(lambda: (tmp_path / "a.pt").write_bytes(bytes(100)), {tmp_path / "a.pt": 100})
        while not writer.in_flight.done():
            time.sleep(0.001)
        writer.wait()
    assert screen.getvalue() == ""


@pytest.mark.parametrize("in_place", [False, True])
def test_the_time_of_a_write_counts_as_waiting_only_where_training_waits(in_place):
    clock_s = 0.0
    stopwatch = Stopwatch(0.0, lambda: clock_s)
    writer = BackgroundWriter(in_place, stopwatch=stopwatch)

    def write():
        nonlocal clock_s
        deadline = time.monotonic() + 9
        while stopwatch.kind == "steps" and time.monotonic() < deadline:
            time.sleep(0.001)
        clock_s += 4

    with stopwatch.counting("steps"):
        writer.submit(write, {})
        writer.wait()
    spent = {kind: seconds for kind, seconds in stopwatch.seconds().items() if seconds}
    assert spent == {"saving" if in_place else "waiting": 4}


def test_what_is_written_is_the_state_as_it_was_however_training_goes_on():
    state = random_train_state(MOE)
    before = {name: weight.clone() for name, weight in state.weights.items()}
    copy = BackgroundWriter().copy(state)
    for weight in state.weights.values():
        weight.add_(1.0)
    assert all(torch.equal(copy.weights[name], weight) for name, weight in before.items())


@pytest.fixture
def slow_disk(monkeypatch):
    """The steps taken beside each file, none of which is there before the training waits for it."""
    monkeypatch.setattr(context, "has_room_for_copy", lambda *_: True)
    torch.set_num_threads(1)
    return slow_disk_down(inf, monkeypatch)


def test_on_the_slowest_disk_a_run_waits_only_at_the_next_write_and_leaves_the_same_files(
    run, undisturbed, slow_disk, monkeypatch
):
    """Phases of 9, 7, 6 and 6 steps; phase 2 begins with a checkpoint of its own."""
    save, log = atomic_io.save_tensors, []

    def save_and_log(*args, **options):
        log.append("begins")
        checksum = save(*args, **options)
        log.append("ends")
        return checksum

    for module in (model, resume):
        monkeypatch.setattr(module, "save_tensors", save_and_log)
    main(replace(run, training=replace(run.training, checkpoint_every="4")))
    ends = [4, 1, 0, 0], [4, 3, 4, 0], [2, 4, 0], [2, 0, 0]
    assert slow_disk == [steps for phase in ends for steps in phase]
    assert log == ["begins", "ends"] * len(slow_disk)
    assert {path.name: path.read_bytes() for path in run.out.glob("*.pt")} == (
        undisturbed.checkpoints
    )
    assert comparable_history(run.out) == undisturbed.history


def test_a_weight_that_is_not_finite_at_a_phases_end_names_the_rate_of_that_phase(
    run, slow_disk, monkeypatch, capsys
):
    """It is found when the next phase has begun: the third copy is that of phase 2's end."""
    copy, calls = BackgroundWriter.copy, count(1)

    def spoil_third(writer, state):
        copied = copy(writer, state)
        if next(calls) == 3:
            copied.weights["norm.weight"][0] = torch.nan
        return copied

    monkeypatch.setattr(BackgroundWriter, "copy", spoil_third)
    rare = replace(run, training=replace(run.training, checkpoint_every="60min"))
    code, _, error = capture_command(lambda: main(rare), capsys)
    assert code == 1 and error.startswith(
        "stopped: phase 2, step 7: norm.weight is not finite; choose a lower --training.lr-phase2 "
    )
    assert error.count("choose a lower") == 1


def test_the_end_of_a_phase_is_written_once_and_the_last_without_adams_state(start_run, run):
    long = replace(run, training=replace(run.training, checkpoint_every="60min"))
    (moment,) = split_moments("before CONTEXT.plot 1")
    assert wait_for_exit(start_run(long, (moment, signal.SIGKILL))) == -signal.SIGKILL
    (last,) = resume_points_of(long)
    content = load_tensors(last)
    assert content["weights"] is None and content["adam"] == {}
    assert last.stat().st_size < 20_000
    assert content["checkpoint"]["file"] == "large_moe_final.pt"


@pytest.mark.parametrize("end", [None, b"", b"no digits"], ids=["other", "empty", "damaged"])
def test_a_point_whose_checkpoint_is_another_is_not_used(end, start_run, run, undisturbed):
    (moment,) = split_moments("after PHASE.grow 1")
    process = start_run(run, (moment, signal.SIGKILL), in_place=True)
    assert wait_for_exit(process) == -signal.SIGKILL
    path = run.out / "dense_model.pt"
    assert load_tensors(resume_points_of(run)[-1])["checkpoint"]["file"] == path.name
    if end is None:
        torch.save(load_tensors(path) | {"seed": 99}, path)
        assert load_checkpoint(path, unchecked=True).seed == 99
    else:
        path.write_bytes(end and path.read_bytes()[: -len(end)] + end)
    finish_and_compare(start_run, run, undisturbed)
    assert read_outcome(run).checkpoints == undisturbed.checkpoints


def test_a_point_whose_history_has_been_written_anew_is_not_used_once_its_checkpoint_is_whole(
    start_run, run, undisturbed
):
    """The point is that of phase 1's end; training up to there again makes the same checkpoint."""
    grown, saved = split_moments("before PHASE.grow 1, after RESUME.save_checkpoint 1")
    process = start_run(run, (grown, signal.SIGKILL), in_place=True)
    assert wait_for_exit(process) == -signal.SIGKILL
    (run.out / "dense_model.pt").unlink()
    process = start_run(replace(run, resume=True), (saved, signal.SIGKILL), in_place=True)
    assert wait_for_exit(process) == -signal.SIGKILL
    finish_and_compare(start_run, run, undisturbed)
    assert "going on at phase 1, step 8" in read_output(run, "stdout")


def test_points_are_removed_only_once_the_end_of_the_history_is_on_the_disk(run, monkeypatch):
    history, on_disk, fsync = run.out / HISTORY_FILE, Counter(), os.fsync

    def fsync_and_note(descriptor):
        fsync(descriptor)
        stat = os.fstat(descriptor)
        on_disk[stat.st_ino] = stat.st_size

    def check_and_remove(out):
        stat = history.stat()
        assert on_disk[stat.st_ino] == stat.st_size
        assert is_finished(out)
        remove_resume_points(out)

    monkeypatch.setattr(os, "fsync", fsync_and_note)
    remove_resume_points = context.remove_resume_points
    monkeypatch.setattr(context, "remove_resume_points", check_and_remove)
    main(run)
    assert not resume_points_of(run)
