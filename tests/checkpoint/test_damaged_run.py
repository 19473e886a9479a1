"""Full disks, damaged resume points and other runs: what is good stays, and the run says how to go
on."""

import re
import shutil
import signal
from dataclasses import replace

import pytest
import torch

from tests.helpers.damage import (
    capture_command,
    edit_content,
    flip_bit,
    set_one_weight,
    snapshot_folder,
)
from tests.helpers.killed_runs import (
    finish_and_compare,
    read_output,
    resume_points_of,
    split_moments,
    wait_for_exit,
)
from tests.helpers.small_runs import MODEL
from train import main
from utils.checkpoint.resume import KEPT_POINTS, RESUME_FOLDER
from utils.metrics.history import HISTORY_FILE
from utils.runtime.atomic_io import load_tensors


@pytest.mark.parametrize("in_place", [False, True], ids=["beside training", "in place"])
@pytest.mark.parametrize(
    "checkpoint_every, max_file_bytes, phase",
    [("2", 200_000, 0), ("2", 500_000, 1), ("2", 2_000_000, 2), ("60min", 3_000, 0)],
)
def test_a_full_disk_stops_the_run_with_all_that_was_good_intact(
    checkpoint_every, max_file_bytes, phase, in_place, start_run, run, undisturbed
):
    run = replace(run, training=replace(run.training, checkpoint_every=checkpoint_every))
    process = start_run(run, max_file_bytes=max_file_bytes, in_place=in_place, steps_per_write=2)
    assert wait_for_exit(process) == 1
    error = read_output(run, "stderr")
    assert error.startswith("stopped: ") and "File too large" in error and error.count("\n") == 1
    points = resume_points_of(run)
    assert len(points) <= KEPT_POINTS and bool(points) == bool(phase)
    assert all(load_tensors(path)["phase"] == phase for path in points)
    hint = f"{points[-1]} is kept: the same command with --resume" if points else "nothing was kept"
    assert hint in error
    finish_and_compare(start_run, run, undisturbed)


@pytest.fixture(scope="module")
def killed_run(undisturbed_run, start_run):
    """A run that was killed after four steps of its second phase."""
    run = replace(undisturbed_run, out=undisturbed_run.out.with_name("killed"))
    (moment,) = split_moments("before STEP 14")
    process = start_run(run, (moment, signal.SIGKILL), in_place=True)
    assert wait_for_exit(process) == -signal.SIGKILL
    return run


@pytest.fixture
def killed(killed_run, run):
    """A copy of it, with its last resume point and the one before."""
    shutil.copytree(killed_run.out, run.out)
    earlier, last = resume_points_of(run)
    assert [path.name for path in (earlier, last)] == [
        "phase002-step00000002.pt",
        "phase002-step00000004.pt",
    ]
    return run, last, earlier


DAMAGES = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[:-100],
    "one bit flipped": lambda data: flip_bit(data, len(data) // 3),
    "of another schema": lambda data: edit_content(data, lambda content: content.update(schema=0)),
    "without a field": lambda data: edit_content(
        data, lambda content: content.pop("history_bytes")
    ),
    "not finite": lambda data: edit_content(data, set_one_weight(float("nan"))),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_point_is_reported_and_the_one_before_leads_to_the_same_end(
    damage, killed, start_run, undisturbed
):
    run, last, _ = killed
    last.write_bytes(damage(last.read_bytes()))
    finish_and_compare(start_run, run, undisturbed)
    output = read_output(run, "stdout")
    assert f"{last}" in output and "trying the one before" in output
    assert "going on at phase 2, step 2" in output


def assert_refused(run, start_run, *phrases):
    """The run ends with exit code 2 and one line that holds every phrase, and changes nothing."""
    before = snapshot_folder(run.out)
    assert wait_for_exit(start_run(run)) == 2
    error = read_output(run, "stderr")
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(phrase in error for phrase in phrases), error
    assert snapshot_folder(run.out) == before


def test_a_run_without_a_whole_point_is_refused_and_not_started_over(killed, start_run):
    run, *points = killed
    for path in points:
        path.write_bytes(flip_bit(path.read_bytes(), 1000))
    assert_refused(replace(run, resume=True), start_run, "none of the points", "is whole")


def test_checkpoints_without_a_point_are_refused_and_not_started_over(killed, start_run):
    run, *points = killed
    for path in points:
        path.unlink()
    phrases = "it holds dense_model.pt, moe_model_init.pt but no resume point", "nothing to resume"
    assert_refused(replace(run, resume=True), start_run, *phrases)


def test_a_history_that_has_become_shorter_is_refused(killed, start_run):
    run, *_ = killed
    history = run.out / HISTORY_FILE
    history.write_bytes(history.read_bytes()[:1000])
    assert_refused(replace(run, resume=True), start_run, f"{history} is shorter than it was")


def test_a_plain_rerun_of_an_unfinished_run_is_refused(killed, start_run):
    phrases = "an unfinished run", "--resume goes on with it", "--overwrite"
    assert_refused(killed[0], start_run, *phrases)


CHANGES = {
    "architecture": (
        lambda run: replace(run, model=replace(MODEL, d_ff=64, n_layers=3)),
        ("model.d_ff was 48, is 64; ", "model.n_layers was 2, is 3"),
    ),
    "seed": (lambda run: replace(run, seed=5), ("seed was 0, is 5",)),
    "schedule": (
        lambda run: replace(run, training=replace(run.training, steps_phase1=12, lr_phase4=1.0)),
        ("training.steps_phase1 was 9, is 12, but phase 1 (dense) has been trained",),
    ),
    "corpus": (
        lambda run: replace(run, data=replace(run.data, num_stories=150)),
        ("corpus (fingerprint) was ",),
    ),
}


@pytest.mark.parametrize("change, phrases", CHANGES.values(), ids=CHANGES)
def test_another_run_is_refused_with_the_list_of_differences(change, phrases, killed, start_run):
    other = replace(change(killed[0]), resume=True)
    assert_refused(other, start_run, f"{other.out}", *phrases)


def test_a_torn_last_line_is_no_part_of_the_history(killed, start_run, undisturbed):
    run, *_ = killed
    with (run.out / HISTORY_FILE).open("a") as file:
        file.write('{"event": "step", "wall')
    finish_and_compare(start_run, run, undisturbed)


def test_another_number_of_threads_goes_on_and_says_that_it_is_not_the_same(killed, start_run):
    run, (moment,) = replace(killed[0], resume=True), split_moments("after STEP 1")
    process = start_run(run, (moment, signal.SIGKILL), threads=2)
    assert wait_for_exit(process) == -signal.SIGKILL
    output = read_output(run, "stdout")
    assert "kept on cpu with 1 threads" in output and "not bit for bit" in output
    assert "going on at phase 2, step 4" in output


def test_resuming_a_finished_run_only_removes_what_is_left_of_it(
    killed, undisturbed_run, undisturbed, start_run
):
    run, *_ = killed
    shutil.copytree(undisturbed_run.out, run.out, dirs_exist_ok=True)
    before = snapshot_folder(run.out)
    assert wait_for_exit(start_run(replace(run, resume=True))) == 0
    left = snapshot_folder(run.out)
    assert left.keys() == snapshot_folder(undisturbed_run.out).keys()
    assert left == {path: before[path] for path in left}


def test_a_file_where_the_points_belong_is_named(run, start_run):
    run.out.mkdir()
    (run.out / RESUME_FOLDER).write_text("no folder")
    assert_refused(run, start_run, f"out = {run.out} cannot be written")


@pytest.mark.parametrize("setting, value", [("steps_phase4", 9), ("lr_phase4", 1e-3)])
def test_a_run_whose_last_phase_has_been_trained_is_refused_more_and_told_how(
    setting, value, start_run, run, undisturbed
):
    """The point at the end of the last phase is without Adam's state."""
    (moment,) = split_moments("before PHASE.sample_stories 4")
    process = start_run(run, (moment, signal.SIGKILL), in_place=True)
    assert wait_for_exit(process) == -signal.SIGKILL
    more = replace(run, resume=True, training=replace(run.training, **{setting: value}))
    changed = f"training.{setting} was {getattr(run.training, setting)}, is {value}"
    source = f"--init-from {run.out / 'large_moe_final.pt'}"
    remedy = "--resume without that change finishes the run, after which this command says how to"
    assert_refused(
        more, start_run, f"{changed}, but phase 4 (deep) has been trained; {remedy}", source
    )
    finish_and_compare(start_run, run, undisturbed)
    assert_refused(more, start_run, f"{changed}; this trains its model further", source)


@pytest.mark.parametrize("lr, log_every", [(1e30, 9), (1e30, 2), (1e39, 9)])
def test_a_loss_that_is_not_finite_leaves_no_point_that_is_not(lr, log_every, run, capsys):
    training = replace(run.training, checkpoint_every="1", log_every=log_every, lr_phase2=lr)
    code, _, error = capture_command(lambda: main(replace(run, training=training)), capsys)
    points = resume_points_of(run)
    where = r"^stopped: phase 2( \(moe\))?, step \d+: [\w.]+ is (nan|inf|not finite)"
    assert code == 1 and re.search(where, error)
    assert error.count("; choose a lower --training.lr-phase2 than ") == 1
    assert f"{points[-1]} is kept: the same command with --resume" in error
    for path in points:
        content = load_tensors(path)
        moments = [moment for values in content["adam"].values() for moment in values.values()]
        weights = (content["weights"] or {}).values()  # at a phase's end, in its checkpoint
        for tensor in [content["metrics"]["sums"], *weights, *moments]:
            assert torch.isfinite(tensor).all(), path
