"""Folders without a run to resume, and a run that has ended: what is said of them helps."""

import re
import shlex
import signal
from dataclasses import replace

import pytest

from config import Phase
from tests.helpers.damage import capture_command, snapshot_folder
from tests.helpers.small_runs import FOUR_PHASES, TRAINING
from train import main
from utils.checkpoint.model import load_checkpoint
from utils.checkpoint.resume import adopt_settings
from utils.checkpoint.run_dir import explain_how_to_resume, is_finished
from utils.metrics.history import HISTORY_FILE, read_history, run_record, select_events
from utils.runtime.cli import parse_run
from utils.runtime.signals import Stopped
from utils.training import context

BRIEF = replace(FOUR_PHASES, steps_phase1=2, steps_phase2=0, steps_phase3=0, steps_phase4=3)


@pytest.mark.parametrize(
    "folder, hint",
    [
        ("runs/full", "it holds no run; perhaps you meant --out runs/full-2"),
        ("runs/fulll-2", "there is no such folder; perhaps you meant --out runs/full-2"),
        ("runs", "it holds no run; there are runs in runs/full-2"),
        ("other", "there is no such folder; --out FOLDER says where the run is"),
    ],
)
def test_a_folder_without_a_run_has_nothing_to_resume_and_one_nearby_is_named(
    folder, hint, tmp_path, monkeypatch, capsys
):
    for name in ("full", "full-2", "notes"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs/full-2" / HISTORY_FILE).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(context, "prepare_corpus", lambda *_: pytest.fail("tokens are made"))
    before = snapshot_folder(tmp_path)
    args = f"tiny --resume --out {folder} --device cpu".split()
    code, output, error = capture_command(lambda: main(parse_run(args, adopt_settings)), capsys)
    assert (code, output) == (2, "")
    assert error == f"error: nothing to resume in {folder}: {hint}\n"
    assert snapshot_folder(tmp_path) == before


def test_a_run_that_had_kept_nothing_yet_begins_anew_when_it_is_resumed(base_run, tmp_path, capsys):
    run = replace(base_run, training=BRIEF, out=tmp_path / "run")
    run.out.mkdir()
    (run.out / HISTORY_FILE).write_bytes(b"")
    main(replace(run, resume=True))
    assert "the run begins anew" in capsys.readouterr().out and is_finished(run.out)


SCHEDULES = {
    "the default schedule": {"training": BRIEF},
    "a schedule of its own": {
        "training": replace(TRAINING, fused_kernels=False, micro_batch_size=1),
        "phases": {"a": Phase(steps=1), "my last": Phase(steps=3, lr=1e-3, batch_size=2)},
    },
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_command_that_a_finished_run_gives_trains_its_model_further(
    schedule, base_run, tmp_path, monkeypatch, capsys
):
    run = replace(base_run, out=tmp_path / "it's a run", **schedule)
    main(run)
    code, output, _ = capture_command(lambda: main(replace(run, resume=True)), capsys)
    offered = output.splitlines()[-1]
    assert code == 0 and " --phases.single.steps 3 " in offered
    phases = run.phases and run.phases | {"my last": replace(run.phases["my last"], steps=9)}
    training = run.training if phases else replace(run.training, steps_phase4=9)
    longer = replace(run, training=training, phases=phases, resume=True)
    for other in (longer, replace(longer, dry_run=True)):
        code, output, error = capture_command(lambda run=other: main(run), capsys)
        assert code == 2 and not output and "was 3, is 9; this trains its model further" in error
    command = error.partition("this trains its model further: ")[2]
    assert command.strip() == offered.replace("single.steps 3 ", "single.steps 6 ")

    python, script, *args = shlex.split(command)
    assert (python, script) == ("python", "train.py")
    more = parse_run(args)
    main(more)
    assert more.out == tmp_path / "it's a run-more" and is_finished(more.out)
    last = list(run.schedule.values())[-1]
    trained = more.schedule["single"]
    assert (trained.steps, trained.lr, trained.batch_size) == (6, last.lr, last.batch_size)
    old, new = (run_record(read_history(each.out / HISTORY_FILE)) for each in (run, more))
    for name in ("fingerprint", "corpus", "device", "eval_tokens", "final_eval_tokens"):
        assert old[name] == new[name], name
    last_file = select_events(read_history(run.out / HISTORY_FILE), "checkpoint")[-1]["path"]
    ends = load_checkpoint(run.out / last_file), load_checkpoint(more.out / "single_final.pt")
    assert ends[1].tokens - ends[0].tokens == 6 * last.batch_size * run.model.seq_len
    assert "run-more1" in capture_command(lambda: main(run), capsys)[2]


def test_a_dry_run_of_a_resumption_shows_what_is_left_and_writes_nothing(
    base_run, tmp_path, monkeypatch, capsys
):
    run = replace(base_run, training=BRIEF, out=tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("utils.training.phase.grow", lambda *_, **__: 1 / 0)
        main(run)
    before = snapshot_folder(run.out)
    dry_run = replace(run, resume=True, dry_run=True)
    code, output, _ = capture_command(lambda: main(dry_run), capsys)
    assert code == 0 and "this run would go on at phase 1, step 2" in output
    assert re.search(r"4 deep .*\n", output)
    other = replace(dry_run, seed=99)
    code, output, error = capture_command(lambda: main(other), capsys)
    assert code == 2 and "seed was 2, is 99" in error and not output, "no plan of what cannot be"
    assert snapshot_folder(run.out) == before


def test_who_stops_a_run_after_its_end_is_told_to_resume_and_not_to_overwrite(finished):
    with pytest.raises(Stopped) as stopped, explain_how_to_resume(finished.out):
        raise Stopped(signal.SIGINT)
    assert "all is trained: the same command with --resume" in str(stopped.value)
    assert "--overwrite" not in str(stopped.value)
