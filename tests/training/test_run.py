"""Whole runs, from the call to the files."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from config import Deepen, InputError, Phase, Upcycle, Widen
from tests.helpers.scripts import run_script
from tests.helpers.small_models import is_identical
from tests.helpers.small_runs import (
    CHECKPOINTS,
    GROWTHS,
    MODEL,
    RUN_FILES,
    TRAINING,
    assert_times_add_up,
    comparable_history,
)
from train import main
from transfer.proof import compare_checkpoints
from utils.checkpoint.model import load_checkpoint
from utils.data import ValidWindows
from utils.metrics.console import SMALLEST_SHARE, run_summary
from utils.metrics.forecast import Forecast
from utils.metrics.history import (
    HISTORY_FILE,
    PLOT_FILE,
    read_history,
    select_events,
    time_spent,
)
from utils.metrics.history_fields import HISTORY_FIELDS
from utils.plot.figure import make_figure
from utils.runtime.formatting import format_duration
from utils.schedule.phases import resolve_phases

SCRIPT = Path(__file__).parents[2] / "transfer" / "verify_growth_mechanics.py"


def test_a_run_leaves_the_files_that_others_rely_on(finished):
    assert {path.name for path in finished.out.iterdir()} == RUN_FILES
    assert (finished.out / PLOT_FILE).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    saved = [load_checkpoint(finished.out / name) for name in CHECKPOINTS]
    assert [checkpoint.tokens for checkpoint in saved] == [640, 640, 1280, 1536, 1664]
    growths = [checkpoint.growth_history for checkpoint in saved]
    assert growths == [GROWTHS[:count] for count in (0, 1, 1, 2, 3)]
    params = [sum(p.numel() for p in checkpoint.state.model().parameters()) for checkpoint in saved]
    assert [params[0], *params[2:]] == read_history(finished.out / HISTORY_FILE)[0]["params"]


def test_the_history_tells_all_in_order_and_holds_no_nan(finished):
    lines = (finished.out / HISTORY_FILE).read_text().splitlines()
    events = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert {event["event"] for event in events} == HISTORY_FIELDS.keys() - {"change"}
    assert [event["event"] for event in (events[0], events[-1])] == ["run", "end"]
    settings = json.loads(json.dumps(asdict(finished), default=str))
    assert (events[0]["config"], events[0]["seed"]) == (settings, finished.seed)
    phases = [(event["phase"], event["phase_name"]) for event in events[1:-1]]
    assert list(dict.fromkeys(phases)) == list(enumerate(("dense", "moe", "wide", "deep"), 1))
    times, tokens = ([e[name] for e in events if name in e] for name in ("wall_s", "tokens"))
    assert times == sorted(times) and tokens == sorted(tokens) and tokens[-1] == 1664
    steps = [event["step"] for event in select_events(events, "eval")]
    assert steps == [0, 3, 5] * 2 + [0, 3, 4] * 2
    steps = [event["step"] for event in select_events(events, "step")]
    assert steps == [2, 4, 5] * 2 + [2, 4] * 2
    seconds = [event["phase_s"] for event in events if event.get("trained")]
    assert 0 < sum(seconds) <= events[-1]["wall_s"]


def test_the_time_of_a_run_is_told_by_what_it_was_spent_on(finished):
    events = read_history(finished.out / HISTORY_FILE)
    assert_times_add_up(events)
    spent = time_spent(events[-1])
    assert all(seconds > 0 for seconds in spent.values())
    line = " ".join(run_summary(events).rpartition("\n\n")[2].split())
    for kind, seconds in spent.items():
        assert (f"{kind} " in line) == (seconds >= SMALLEST_SHARE * events[-1]["wall_s"])
    whole, steps = map(format_duration, (events[-1]["wall_s"], spent["steps"]))
    assert line.startswith(f"{whole} in all: ")
    title = " ".join(make_figure({"run": events}).get_suptitle().split())
    assert f", {whole} ({steps} of steps): " in title


def test_the_time_of_a_run_counts_from_the_start_of_its_command(base_run, tmp_path):
    run = replace(base_run, phases={"only": Phase(steps=1)}, training=TRAINING, out=tmp_path / "a")
    main(run, started_s=time.perf_counter() - 1000)
    first, *_, end = read_history(run.out / HISTORY_FILE)
    assert 1000 < first["wall_s"] <= end["wall_s"] and end["start_s"] > 1000 > end["steps_s"] > 0


def test_every_evaluation_of_a_run_is_foreseen_wherever_it_goes_on(finished):
    events = select_events(read_history(finished.out / HISTORY_FILE), "eval")
    phases, empty = resolve_phases(finished), torch.zeros(0, 2, dtype=torch.int64)
    valid = ValidWindows(empty, empty, 0, 0, 0, 0)
    forecast = Forecast(phases, finished.training, valid, torch.device("cpu"), torch.float32)
    for phase in phases:
        steps = [event["step"] for event in events if event["phase"] == phase.number]
        for done in range(phase.steps + 1):
            assert forecast.evaluations(phase, done) == sum(step >= done for step in steps)


def test_no_growth_moves_the_model_and_training_goes_on_where_it_was(finished):
    events = read_history(finished.out / HISTORY_FILE)
    for event, growth in zip(select_events(events, "grow"), GROWTHS, strict=True):
        assert event["growth"] == type(growth).__name__ and event["passed"]
        assert event["max_logit_diff"] <= event["logit_limit"] < 1e-5
        assert abs(event["loss_drift"]) <= 2 * event["logit_limit"]
    for before, after in pairwise(select_events(events, "eval")):
        if after["step"] == 0:
            assert after["valid_loss"] == pytest.approx(before["valid_loss"], abs=1e-4)


def test_the_seed_decides_everything_and_overwrite_runs_anew(finished, tmp_path):
    shutil.copytree(finished.out, tmp_path, dirs_exist_ok=True)
    with pytest.raises(InputError, match="a finished run: --overwrite"):
        main(replace(finished, out=tmp_path))
    for seed in (1, finished.seed):
        main(replace(finished, out=tmp_path, overwrite=True, seed=seed))
        same = [
            is_identical(*(load_checkpoint(out / name).state for out in (finished.out, tmp_path)))
            for name in CHECKPOINTS
        ]
        assert same == [seed == finished.seed] * len(CHECKPOINTS)
    assert comparable_history(tmp_path) == comparable_history(finished.out)


def test_random_initial_weights_follow_from_the_seed(base_run, tmp_path):
    def start_with(seed, name):
        phases = {"start": Phase(steps=0)}
        run = replace(base_run, phases=phases, training=TRAINING, seed=seed, out=tmp_path / name)
        main(run)
        return load_checkpoint(run.out / "start_final.pt").state

    one, again, other = start_with(5, "one"), start_with(5, "again"), start_with(6, "other")
    assert is_identical(one, again) and not is_identical(one, other)


def test_another_order_of_phases_is_other_data_and_no_other_code(train_schedule):
    growths = {"dense": None, "wide": Widen(3), "moe": Upcycle(4), "deep": Deepen(2)}
    events, checkpoints = train_schedule(
        **{name: Phase(growth, steps=2) for name, growth in growths.items()}
    )
    grown = [event["growth"] for event in select_events(events, "grow")]
    assert grown == ["Widen", "Upcycle", "Deepen"]
    wide = replace(MODEL, d_model=96, n_heads=6, d_ff=144, logit_scale=1 / 3)
    assert checkpoints[-1].config == replace(wide, num_experts=4, n_layers=4)


def test_two_checkpoints_are_the_same_function_right_after_growth_and_not_later(finished, tmp_path):
    dense, grown, last = (finished.out / CHECKPOINTS[i] for i in (0, 1, 4))
    assert compare_checkpoints(dense, grown) and not compare_checkpoints(dense, last)
    with pytest.raises(InputError, match="did not grow out of"):
        compare_checkpoints(last, dense)
    command = [sys.executable, SCRIPT, "--before", dense, "--after", last]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.endswith("NOT every law holds\n")


RUN_ON_CPU = """
import sys
from pathlib import Path
from tests.helpers.small_runs import small_run
from train import main
main(small_run(Path({folder!r})))
assert "torch._dynamo" not in sys.modules, "seconds of every start"
"""


def test_a_run_on_a_cpu_does_not_load_torchs_compiler(tmp_path):
    run_script(RUN_ON_CPU.format(folder=str(tmp_path)))
