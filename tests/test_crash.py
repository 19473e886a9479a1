"""A run that is killed or stopped, at any moment, goes on as if nothing had been."""

import faulthandler
import multiprocessing.forkserver
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import count
from math import inf
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch

from config import Deepen, TrainingConfig, Upcycle, tiny
from train import main
from utils import sketch
from utils.cli import run_command
from utils.files import load_tensors
from utils.history import HISTORY, read
from utils.resume import FOLDER, KEPT

ROOT = Path(__file__).parent.parent
SECONDS = 60
"""No process of these tests takes as long."""
MODEL = replace(tiny().model, vocab_size=300, d_model=32, n_layers=2, d_ff=48, seq_len=32)
BRIEF = TrainingConfig(log_every=2, eval_every=3, eval_tokens=400, sample_tokens=4)
STEPS = {f"steps_phase{i}": steps for i, steps in enumerate((9, 7, 6, 6), 1)}
FOUR = replace(BRIEF, **STEPS, batch_size=4, upcycle=Upcycle(4), deepen=Deepen(2))
LAZY = ["torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg"]
"""What a run imports only where it needs it."""
FORKS = multiprocessing.get_context("forkserver")
WRITE = "utils.files.Checksum.write"
KILLS = {
    "from the first step to the third point": """
        before train.record_start 1, before train.training_step 1, before torch.save 1,
        amid WRITE 3, after torch.save 1, before pathlib.Path.replace 1,
        after pathlib.Path.replace 1, after utils.resume.save_tensors 2,
        before utils.resume.points 4""",
    "while it grows": """
        before train.grow 1, after train.grow 1, after train.save_model 2, after train.grown 1,
        after train.grow 2, before train.save_model 1, before train.grow 2, after train.grow 1""",
    "between phases": """
        before train.samples 1, after train.samples 1, before train.save_model 1,
        before pathlib.Path.replace 2, after train.save_model 1, after train.train 1,
        after train.run_phase 1, before train.wake 2, after train.run_phase 1,
        after train.run_phase 1""",
    "while it reports, and at the end": """
        before utils.reporter.evaluate 3, after utils.reporter.evaluate 3,
        after utils.history.History.__call__ 4, before utils.lab.save 1, amid WRITE 9,
        before train.plot 1, after train.plot 1, before train.forget 1, after train.forget 1""",
    "while it draws": """
        before utils.sketch.plot 2, amid WRITE 1, after utils.sketch.plot 3,
        before matplotlib.figure.Figure.savefig 1, after matplotlib.figure.Figure.savefig 2""",
}
STOPS = """
    before utils.tokens.learn 1, before utils.tokens.write 1, after utils.tokens.encoder 1,
    before train.record_start 1,
    before train.training_step 4, after train.training_step 2, before utils.reporter.evaluate 2,
    before utils.sketch.plot 1,
    before WRITE 7, after WRITE 3, after torch.save 1, before utils.lab.stories 2,
    before train.grow 1,
    after train.grow 1, before train.save_model 2, before utils.history.History.__call__ 5,
    before train.plot 1"""
ACTIVITIES = """
    prepare keep save_model plot samples evaluate grow training_step wake latest report check_memory
    record_start run_phase main"""
"""Functions that tell, the innermost first, what a run was about."""


def moments(text):
    return [line.strip() for line in text.replace("WRITE", WRITE).split(",")]


def arm(moment, number):
    """This process gets the signal before, amid (half is written) or after the n-th call."""
    when, name, nth = moment.split()
    where, _, last = name.rpartition(".")
    owner, calls = resolve_name(where), count(1)
    called = getattr(owner, last)

    def fatal(*args, **kwargs):
        at = when if next(calls) == int(nth) else ""
        if at == "before":
            os.kill(os.getpid(), number)
        if at == "amid":
            file, data = args
            called(file, data[: len(data) // 2])
            file.flush()
            os.kill(os.getpid(), number)
        result = called(*args, **kwargs)
        if at == "after":
            os.kill(os.getpid(), number)
        return result

    setattr(owner, last, fatal)
    if "sketch" in name or "savefig" in name:
        sketch.SHARE = inf  # so short a run would not be drawn


def end_after(seconds, number, stack):
    """Of this process's own time, which a loaded machine does not make pass: it gets the signal or,
    if that is SIGPROF, leaves its stack and is gone as from a SIGKILL."""
    if number == signal.SIGPROF:
        faulthandler.register(number, stack, all_threads=False, chain=True)
    else:
        signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), number))
    signal.setitimer(signal.ITIMER_PROF, seconds)


def carry_out(run, said, armed, late, room, threads):
    """In a process of its own, whose stdout and stderr are files beside `said`, and none of whose
    files may grow beyond `room` bytes, as on a disk that is full."""
    for stream, end in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(f"{said}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    stack = os.open(f"{said}.stack", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for moment, number in armed:
        arm(moment, number)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    torch.set_num_threads(threads)
    if late:
        end_after(*late, stack)
    run_command(lambda: main(run))
    signal.setitimer(signal.ITIMER_PROF, 0)
    said.with_name(f"{said.name}.seconds").write_text(str(time.process_time()))


def left(process):
    """The exit code, or less than 0: the signal that ended it."""
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        pytest.fail(f"still there after {SECONDS} s")
    return process.exitcode


def outcome(folder):
    """All that a run leaves, but for timings."""
    events = read(folder / HISTORY)
    for name in ("config", "commit"):
        events[0].pop(name)
    record = [{k: v for k, v in event.items() if not k.endswith("_s")} for event in events]
    return {path.name: path.read_bytes() for path in folder.glob("*.pt")}, record


@pytest.fixture(scope="module")
def start():
    """Begins a run in a process forked from one that has imported everything, in milliseconds."""
    FORKS.set_forkserver_preload(["test_crash", *LAZY])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()

    def start(run, *armed, late=None, room=resource.RLIM_INFINITY, threads=1):
        said = run.out.with_name(f"{run.out.name}-said")
        process = FORKS.Process(
            target=carry_out, args=(run, said, armed, late, room, threads), daemon=True
        )
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crash")
    data = replace(tiny().data, num_stories=200, cache=folder / "cache")
    training = replace(FOUR, checkpoint_every="2")
    out = folder / "whole"
    return replace(tiny(), model=MODEL, training=training, data=data, out=out, device="cpu")


@pytest.fixture(scope="module")
def whole(small, start):
    """What the run comes to that nobody stops, and the seconds of its own that it takes."""
    assert left(start(small)) == 0
    seconds = small.out.with_name("whole-said.seconds").read_text()
    return outcome(small.out), float(seconds)


@pytest.fixture
def run(small, tmp_path):
    return replace(small, out=tmp_path / "run")


def finish(start, run, whole):
    """Goes on with what is left of a run, to the same end."""
    assert left(start(replace(run, resume=True))) == 0
    files, record = outcome(run.out)
    assert files.keys() == whole[0][0].keys()
    assert not [name for name, content in files.items() if content != whole[0][0][name]]
    assert record == whole[0][1]
    wanted = {*whole[0][0], HISTORY, "training_curves.png"}
    assert {path.name for path in run.out.iterdir()} == wanted


@pytest.mark.parametrize("chain", KILLS.values(), ids=KILLS)
def test_a_run_killed_again_and_again_ends_as_if_it_never_had_been(chain, start, run, whole):
    for number, moment in enumerate(moments(chain)):
        process = start(replace(run, resume=number > 0), (moment, signal.SIGKILL))
        assert left(process) == -signal.SIGKILL, moment
        assert len(list((run.out / FOLDER).glob("*.pt"))) <= KEPT + 1
    finish(start, run, whole)


def doing(out):
    """The phase that a killed run was in, and what it was about."""
    stack = out.with_name(f"{out.name}-said.stack").read_text()
    seen = [line.split()[-1] for line in stack.splitlines()]
    events = read(out / HISTORY) if (out / HISTORY).exists() else []
    phase = max((event.get("phase", 0) for event in events), default=0)
    return phase, next((name for name in ACTIVITIES.split() if name in seen), "start")


def killed(start, run, whole, chance, times):
    """Kills a run at random moments, then finishes it. Returns what it was about each time."""
    tally = Counter()
    for _ in range(times):
        late = whole[1] * chance.uniform(0.02, 0.25), signal.SIGPROF
        code = left(start(replace(run, resume=True), late=late))
        assert code in (0, -signal.SIGPROF)
        if code:
            tally[doing(run.out)] += 1
    finish(start, run, whole)
    return tally


@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_at_random_moments_ends_as_if_it_never_had_been(seed, start, run, whole):
    assert killed(start, run, whole, random.Random(seed), 5).total() >= 2


@pytest.mark.long
def test_two_hundred_kills_at_random_moments_leave_no_trace(start, run, whole, capsys):
    tally, chance = Counter(), random.Random(0)
    for number in range(200):
        out = run.out.with_name(f"run{number}")
        tally += killed(start, replace(run, out=out), whole, chance, 4)
        if tally.total() >= 200:
            break
    with capsys.disabled():
        print(f"\n{tally.total()} kills of {number + 1} runs, by phase:")
        for (phase, activity), times in sorted(tally.items()):
            print(f"{phase}  {activity:<16}{times:>4}")
    assert tally.total() >= 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_says_how_to_go_on_and_does(number, start, run, whole):
    cold = replace(run.data, cache=run.out.with_name("cold"))
    for moment in moments(STOPS):
        process = start(replace(run, data=cold, resume=run.out.exists()), (moment, number))
        assert left(process) == 128 + number, moment
        said = run.out.with_name("run-said.err").read_text()
        assert said.startswith(f"stopped by {number.name}; ") and said.count("\n") == 1, moment
        assert ("--resume goes on" if list(run.out.glob(f"{FOLDER}/*.pt")) else "run") in said
    finish(start, run, whole)


@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_is_told_to_stop_at_random_moments_goes_on(seed, start, run, whole):
    chance, codes = random.Random(seed), []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        late = whole[1] * chance.uniform(0.02, 0.25), number
        codes.append((left(start(replace(run, resume=True), late=late)), 128 + number))
    assert codes[0][0] == codes[0][1] and all(code in (0, wanted) for code, wanted in codes)
    finish(start, run, whole)


def test_a_second_ctrl_c_leaves_at_once_with_the_old_point_intact(start, run, whole):
    assert left(start(run, ("after train.training_step 3", signal.SIGKILL))) == -signal.SIGKILL
    (old,) = run.out.glob(f"{FOLDER}/*.pt")
    twice = ("before train.training_step 2", "after torch.save 1")
    process = start(replace(run, resume=True), *((moment, signal.SIGINT) for moment in twice))
    assert left(process) == 128 + signal.SIGINT
    assert list(run.out.glob(f"{FOLDER}/*.pt")) == [old] and load_tensors(old)
    finish(start, run, whole)


def test_a_folder_is_one_live_runs_alone_and_free_once_that_is_killed(start, run, whole):
    stopped = ("after train.training_step 4", signal.SIGSTOP)
    process, deadline = start(run, stopped), time.monotonic() + SECONDS
    while not list(run.out.glob(f"{FOLDER}/*.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    other = replace(run, out=run.out / ".." / "run", resume=True)
    assert left(start(other)) == 2
    assert "is being written by another run" in run.out.with_name("run-said.err").read_text()
    process.kill()
    assert left(process) == -signal.SIGKILL
    finish(start, run, whole)
