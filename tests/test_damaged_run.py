"""Full disks, damaged points and other runs: what is good is kept, and it is said how to go on."""

import re
import shutil
import signal
from dataclasses import replace

import pytest
import test_crash
import torch
from damage import changed, code_of, flip, poisoned, tree
from test_crash import MODEL, finish, left

from train import main
from utils.files import load_tensors
from utils.history import HISTORY, read
from utils.resume import FOLDER

start, small, whole, run = (getattr(test_crash, n) for n in ("start", "small", "whole", "run"))


@pytest.mark.parametrize(
    "often, room, phase",
    [("2", 200_000, 0), ("2", 500_000, 1), ("2", 2_000_000, 2), ("60min", 3_000, 0)],
)
def test_a_full_disk_stops_the_run_with_all_that_was_good_intact(
    often, room, phase, start, run, whole
):
    run = replace(run, training=replace(run.training, checkpoint_every=often))
    assert left(start(run, room=room)) == 1
    said = run.out.with_name("run-said.err").read_text()
    assert said.startswith("stopped: ") and "File too large" in said and said.count("\n") == 1
    kept = sorted(run.out.glob(f"{FOLDER}/*.pt"))
    assert len(kept) <= 2 and all(load_tensors(path)["phase"] == phase for path in kept)
    assert bool(kept) == bool(phase)
    way = f"{kept[-1]} is kept: the same command with --resume" if kept else "nothing was kept yet"
    assert way in said
    finish(start, run, whole)


@pytest.fixture(scope="module")
def half(small, start):
    """The folder of a run that was killed after four steps of its second phase."""
    run = replace(small, out=small.out.with_name("half"))
    moment = ("before train.training_step 14", signal.SIGKILL)
    assert left(start(run, moment)) == -signal.SIGKILL
    return run.out


@pytest.fixture
def killed(half, run):
    """That run, and its points: the last and the one before."""
    shutil.copytree(half, run.out)
    old, last = sorted(run.out.glob(f"{FOLDER}/*.pt"))
    assert [path.name[-6:] for path in (old, last)] == ["002.pt", "004.pt"]
    return run, last, old


POINTS = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[:-100],
    "one bit flipped": lambda data: flip(data, len(data) // 3),
    "of another schema": lambda data: changed(data, lambda content: content.update(schema=0)),
    "without a field": lambda data: changed(data, lambda content: content.pop("history")),
    "not finite": lambda data: changed(data, poisoned(float("nan"))),
}


@pytest.mark.parametrize("damage", POINTS.values(), ids=POINTS)
def test_a_damaged_point_is_reported_and_the_one_before_leads_to_the_same_end(
    damage, killed, start, whole
):
    run, last, _ = killed
    last.write_bytes(damage(last.read_bytes()))
    finish(start, run, whole)
    said = run.out.with_name("run-said.out").read_text()
    assert f"{last}" in said and "trying the one before" in said
    assert "going on at phase 2, step 2" in said


def refused(run, start, *says):
    """With exit code 2 and one line that `says` what is wrong, and nothing changed."""
    before = tree(run.out)
    assert left(start(run)) == 2
    said = run.out.with_name("run-said.err").read_text()
    assert said.startswith("error: ") and said.count("\n") == 1
    assert all(part in said for part in says), said
    assert tree(run.out) == before


def test_a_run_without_a_whole_point_is_refused_and_not_started_over(killed, start):
    run, *points = killed
    for path in points:
        path.write_bytes(flip(path.read_bytes(), 1000))
    refused(replace(run, resume=True), start, "none of the points", "is whole")


def test_a_plain_rerun_of_an_unfinished_run_is_refused(killed, start):
    refused(killed[0], start, "an unfinished run", "--resume goes on with it", "--overwrite")


@pytest.mark.parametrize("change, says", {
    "architecture": (lambda run: replace(run, model=replace(MODEL, d_ff=64, n_layers=3)),
                     ("model.d_ff was 48, is 64; ", "model.n_layers was 2, is 3")),
    "seed": (lambda run: replace(run, seed=5), ("seed was 0, is 5",)),
    "schedule": (lambda run: replace(run, training=replace(run.training, steps_phase4=9)),
                 ("training.steps_phase4 was 6, is 9",)),
    "corpus": (lambda run: replace(run, data=replace(run.data, num_stories=150)),
               ("corpus (fingerprint) was ",)),
}.values(), ids=["architecture", "seed", "schedule", "corpus"])  # fmt: skip
def test_another_run_is_refused_with_the_list_of_differences(change, says, killed, start):
    refused(replace(change(killed[0]), resume=True), start, "holds another run", *says)


def test_a_torn_last_line_is_no_part_of_the_history(killed, start, whole):
    with (killed[0].out / HISTORY).open("a") as file:
        file.write('{"event": "step", "wall')
    finish(start, killed[0], whole)


def test_another_number_of_threads_goes_on_and_says_that_it_is_not_the_same(killed, start):
    run, end = replace(killed[0], resume=True), ("after train.run_phase 1", signal.SIGKILL)
    assert left(start(run, end, threads=2)) == -signal.SIGKILL
    said = run.out.with_name("run-said.out").read_text()
    assert "kept on cpu with 1 threads" in said and "not bit for bit" in said
    last = [event for event in read(run.out / HISTORY) if event["event"] == "checkpoint"][-1]
    assert last["phase"] == 2 and last["trained"]


def test_resuming_a_finished_run_only_removes_what_is_left_of_it(run, small, start, whole, killed):
    shutil.copytree(small.out, run.out, dirs_exist_ok=True)
    before = {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in run.out.iterdir()
        if path.is_file()
    }
    assert left(start(replace(run, resume=True))) == 0
    assert {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.out.iterdir()
    } == before


def test_a_file_where_the_points_belong_is_named(run, start):
    run.out.mkdir()
    (run.out / FOLDER).write_text("no folder")
    refused(run, start, f"out = {run.out} cannot be written")


@pytest.mark.parametrize("lr, log_every", [(1e30, 9), (1e30, 2), (1e39, 9)])
def test_a_loss_that_is_not_finite_leaves_no_point_that_is(lr, log_every, run, capsys):
    training = replace(run.training, checkpoint_every="1", log_every=log_every, lr_phase2=lr)
    code, said = code_of(lambda: main(replace(run, training=training)), capsys)
    kept = sorted(run.out.glob(f"{FOLDER}/*.pt"))
    assert code == 1 and re.search(
        r"^stopped: phase 2( \(moe\))?, step \d+: [\w.]+ is (nan|inf|not finite)", said
    )
    assert f"{kept[-1]} is kept: the same command with --resume" in said
    for path in kept:
        content = load_tensors(path)
        adam = [moment for moments in content["adam"].values() for moment in moments.values()]
        for tensor in [content["reading"]["sums"], *content["weights"].values(), *adam]:
            assert torch.isfinite(tensor).all(), path
