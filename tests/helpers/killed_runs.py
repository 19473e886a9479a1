"""Runs in processes of their own that get a signal, or whose disk fails, at a chosen moment.

A moment is `WHEN FUNCTION N`, such as `before utils.training.step.train_step 3`: before, after or
amid (half is written) the N-th call of a function, which is named in the module that calls it.
"""

import faulthandler
import multiprocessing.forkserver
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from itertools import count
from math import inf
from multiprocessing.process import BaseProcess
from pathlib import Path
from pkgutil import resolve_name
from threading import Condition, Thread, current_thread, main_thread
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from config import Run
from tests.helpers.small_runs import RUN_FILES, assert_times_add_up, comparable_history
from train import main
from utils.checkpoint import background
from utils.checkpoint.resume import RESUME_FOLDER
from utils.metrics.history import HISTORY_FILE, read_history
from utils.plot import live
from utils.runtime.atomic_io import ChecksumWriter
from utils.runtime.cli import run_command
from utils.runtime.threads import POLL_S
from utils.training import context, step

ROOT = Path(__file__).parents[2]
MAX_SECONDS = 60
"""No process of these tests takes as long."""
LAZY_IMPORTS = [
    "matplotlib.backends.backend_agg", "matplotlib.figure", "utils.training.phase",
]  # fmt: skip
"""Modules that a run imports only where it needs them."""
SHORT_NAMES = {
    "BACKGROUND": "utils.checkpoint.background.BackgroundWriter",
    "CONTEXT": "utils.training.context",
    "PHASE": "utils.training.phase",
    "REPORTER": "utils.training.reporter",
    "RESUME": "utils.checkpoint.resume",
    "STEP": "utils.training.step.train_step",
    "SYNC_FOLDER": "utils.runtime.atomic_io.fsync_folder",
    "WRITE": "utils.runtime.atomic_io.ChecksumWriter.write",
}
FORKS = multiprocessing.get_context("forkserver")
StartRun = Callable[..., BaseProcess]
"""Starts a run: see `make_start_run`."""


class Outcome(NamedTuple):
    """What a run comes to that nobody stops."""

    checkpoints: dict[str, bytes]
    history: list[dict]
    cpu_seconds: float
    """Seconds of its own that the process took."""


def split_moments(text: str) -> list[str]:
    """Returns the moments of a text, which commas separate, with SHORT_NAMES written out."""
    for short, name in SHORT_NAMES.items():
        text = text.replace(short, name)
    return [moment.strip() for moment in text.split(",")]


def arm(moment: str, event: int | OSError) -> None:
    """Makes this process send itself a signal, or raise an error, at a moment."""
    when, name, nth = moment.split()
    owner_name, _, attribute = name.rpartition(".")
    owner, calls = resolve_name(owner_name), count(1)
    original = getattr(owner, attribute)

    def happen() -> None:
        if isinstance(event, OSError):
            raise event
        os.kill(os.getpid(), event)
        if current_thread() is not main_thread():
            time.sleep(2 * POLL_S)  # the main thread, which handles signals, has looked then

    def call_and_interrupt(*args, **kwargs):
        now = when if next(calls) == int(nth) else ""
        if now == "before":
            happen()
        if now == "amid":
            writer, data = args
            written = original(writer, data[: len(data) // 2])
            writer.flush()
            happen()
            return written + original(writer, data[written:])
        result = original(*args, **kwargs)
        if now == "after":
            happen()
        return result

    setattr(owner, attribute, call_and_interrupt)
    if "plot.live" in name or "savefig" in name:
        live.MAX_TIME_SHARE = inf  # so short a run would not be drawn


def slow_disk_down(steps: float, patch: pytest.MonkeyPatch) -> list[int]:
    """Makes the disk so slow that a file which is written beside the training gets its first byte
    only once that has gone on for `steps`, or waits. Returns a list that gets the steps that were
    taken meanwhile, for each file."""
    changed, taken, before, is_waiting, steps_beside = Condition(), 0, 0, False, []
    init, train_step = ChecksumWriter.__init__, step.train_step
    start_thread, wait = background.start_thread, background.wait_interruptibly

    def start_thread_here(write: Callable[[], object]) -> tuple[Future[object], Thread]:
        nonlocal before
        before = taken
        return start_thread(write)

    def start_late(*args) -> None:
        nonlocal before
        init(*args)
        if current_thread() is main_thread():
            return
        with changed:
            changed.wait_for(lambda: is_waiting or taken >= before + steps, MAX_SECONDS)
            steps_beside.append(taken - before)
            before = taken

    def count_step(*args) -> Tensor:
        nonlocal taken
        with changed:
            taken += 1
            changed.notify()
        return train_step(*args)

    def say_wait(*args) -> None:
        nonlocal is_waiting
        with changed:
            is_waiting = True
            changed.notify()
        try:
            wait(*args)
        finally:
            is_waiting = False

    patch.setattr(ChecksumWriter, "__init__", start_late)
    patch.setattr(step, "train_step", count_step)
    patch.setattr(background, "start_thread", start_thread_here)
    patch.setattr(background, "wait_interruptibly", say_wait)
    return steps_beside


def signal_after(cpu_seconds: float, number: int, stack_file: int) -> None:
    """Makes this process send itself a signal after seconds of its own, which do not pass while
    others keep the machine busy. SIGPROF leaves the stack in a file and kills as SIGKILL does."""
    if number == signal.SIGPROF:
        faulthandler.register(number, stack_file, all_threads=False, chain=True)
    else:
        signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), number))
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)


def output_file(run: Run, kind: str) -> Path:
    """Returns where a run's process leaves its `stdout`, `stderr`, `stack` or CPU `seconds`."""
    return run.out.with_name(f"{run.out.name}-{kind}.txt")


def read_output(run: Run, kind: str) -> str:
    """Returns what a run's last process left of a kind."""
    return output_file(run, kind).read_text()


def run_in_child(
    run: Run,
    armed: tuple[tuple[str, int | OSError], ...],
    timer: tuple[float, int] | None,
    max_file_bytes: int,
    threads: int,
    in_place: bool,
    steps_per_write: int,
) -> None:
    """Carries a run out in this process, which is a new one."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for stream, kind in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        os.dup2(os.open(output_file(run, kind), flags), stream.fileno())
    stack_file = os.open(output_file(run, "stack"), flags)
    if steps_per_write:
        slow_disk_down(steps_per_write, pytest.MonkeyPatch())
    for moment, event in armed:
        arm(moment, event)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, resource.RLIM_INFINITY))
    torch.set_num_threads(threads)
    context.has_room_for_copy = lambda *_: not in_place
    if timer:
        signal_after(*timer, stack_file)
    run_command(lambda: main(run))
    signal.setitimer(signal.ITIMER_PROF, 0)
    output_file(run, "seconds").write_text(str(time.process_time()))


def make_start_run() -> StartRun:
    """Returns a function that starts a run in a process forked from one that has imported
    everything. Its options are signals and errors to arm, as (moment, signal) or (moment,
    OSError); `timer`, a signal after CPU seconds; `max_file_bytes`, beyond which no file grows, as
    on a full disk; `threads`; `in_place`, to write files while the training waits, as where memory
    is short; and `steps_per_write`, for a disk as slow as that."""
    FORKS.set_forkserver_preload([__name__, *LAZY_IMPORTS])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()

    def start_run(
        run: Run,
        *armed: tuple[str, int | OSError],
        timer: tuple[float, int] | None = None,
        max_file_bytes: int = resource.RLIM_INFINITY,
        threads: int = 1,
        in_place: bool = False,
        steps_per_write: int = 0,
    ) -> BaseProcess:
        options = run, armed, timer, max_file_bytes, threads, in_place, steps_per_write
        process = FORKS.Process(target=run_in_child, args=options, daemon=True)
        process.start()
        return process

    return start_run


def wait_for_exit(process: BaseProcess) -> int | None:
    """Returns the exit code; a signal that ended the process is less than 0."""
    process.join(MAX_SECONDS)
    if process.is_alive():
        process.kill()
        pytest.fail(f"still there after {MAX_SECONDS} s")
    return process.exitcode


def resume_points_of(run: Run) -> list[Path]:
    """Returns the points to resume from in a run's folder, oldest first."""
    return sorted((run.out / RESUME_FOLDER).glob("*.pt"))


def read_outcome(run: Run) -> Outcome:
    """Returns what a finished run has come to."""
    checkpoints = {path.name: path.read_bytes() for path in run.out.glob("*.pt")}
    return Outcome(checkpoints, comparable_history(run.out), float(read_output(run, "seconds")))


def finish_and_compare(start_run: StartRun, run: Run, undisturbed: Outcome) -> None:
    """Goes on with what is left of a run, and asserts that it ends as if nobody had stopped it."""
    assert wait_for_exit(start_run(replace(run, resume=run.out.exists()))) == 0
    outcome = read_outcome(run)
    assert outcome.checkpoints.keys() == undisturbed.checkpoints.keys()
    for name, content in outcome.checkpoints.items():
        assert content == undisturbed.checkpoints[name], f"{name} has other bits"
    assert outcome.history == undisturbed.history
    assert_phases_last_from_their_first_line_on(run)
    assert_times_add_up(read_history(run.out / HISTORY_FILE))
    assert {path.name for path in run.out.iterdir()} == RUN_FILES


def assert_phases_last_from_their_first_line_on(run: Run) -> None:
    """Asserts that the time of a phase includes what it took before the run was stopped."""
    events = read_history(run.out / HISTORY_FILE)
    for trained in (event for event in events if event.get("trained")):
        times = [e["wall_s"] for e in events if e.get("phase") == trained["phase"]]
        *_, last_before, _ = times
        assert last_before - times[0] <= trained["phase_s"] <= trained["wall_s"]
