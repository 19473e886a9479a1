"""What is kept is written beside the training, and comes to the same as if training had waited."""

import signal
import time
from dataclasses import replace
from threading import Event

import pytest
import torch

from tests.helpers.killed_runs import (
    finish_and_compare,
    read_outcome,
    resume_points_of,
    split_moments,
    wait_for_exit,
)
from tests.helpers.small_models import MOE, random_train_state
from tests.helpers.small_runs import comparable_history
from train import main
from utils.checkpoint.background import BackgroundWriter
from utils.checkpoint.model import load_checkpoint
from utils.runtime.atomic_io import ChecksumWriter, load_tensors


def test_one_write_is_in_flight_at_a_time_and_the_caller_need_not_wait():
    writer, goes_on, order = BackgroundWriter(), Event(), []
    writer.submit(lambda: (goes_on.wait(9), order.append(1)))
    assert order == []
    goes_on.set()
    writer.submit(lambda: order.append(2))
    assert order[0] == 1
    writer.wait()
    assert order == [1, 2]


@pytest.mark.parametrize("call", ["check", "wait", "submit", "copy"])
def test_what_stops_a_write_is_raised_by_the_next_call_once(call):
    def fail():
        raise OSError("the disk is full")

    writer = BackgroundWriter()
    writer.submit(fail)
    while writer.in_flight is not None and not writer.in_flight.done():
        time.sleep(0.001)
    calls = {
        "check": writer.check,
        "wait": writer.wait,
        "submit": lambda: writer.submit(lambda: None),
        "copy": lambda: writer.copy(random_train_state(MOE)),
    }
    with pytest.raises(OSError, match="the disk is full"):
        calls[call]()
    writer.wait()


def test_what_is_written_is_the_state_as_it_was_however_training_goes_on():
    state = random_train_state(MOE)
    before = {name: weight.clone() for name, weight in state.weights.items()}
    copy = BackgroundWriter().copy(state)
    for weight in state.weights.values():
        weight.add_(1.0)
    assert all(torch.equal(copy.weights[name], weight) for name, weight in before.items())


def test_a_slow_disk_changes_nothing_that_a_run_leaves(run, undisturbed, monkeypatch):
    write = ChecksumWriter.write

    def write_slowly(writer, data):
        time.sleep(0.002)
        return write(writer, data)

    monkeypatch.setattr(ChecksumWriter, "write", write_slowly)
    torch.set_num_threads(1)
    main(run)
    assert {path.name: path.read_bytes() for path in run.out.glob("*.pt")} == (
        undisturbed.checkpoints
    )
    assert comparable_history(run.out) == undisturbed.history


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
