import os
import sys
from dataclasses import replace
from math import inf

import pytest

from config import Phase, TrainingConfig, Upcycle
from tests.helpers.small_models import is_identical
from tests.helpers.small_runs import comparable_history, small_run
from train import main
from utils.checkpoint.model import load_checkpoint
from utils.metrics.history import HISTORY_FILE, PLOT_FILE, read_history, select_events
from utils.plot import live
from utils.plot.figure import plot
from utils.plot.live import MAX_TIME_SHARE, LivePlot

TRAINING = TrainingConfig(log_every=2, eval_every=2, eval_tokens=400, sample_tokens=0)
PHASES = {
    "dense": Phase(steps=4, batch_size=2),
    "moe": Phase(Upcycle(4), steps=2, batch_size=2),
}
EVALUATIONS = 5


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return replace(small_run(tmp_path_factory.mktemp("live"), TRAINING), phases=PHASES)


@pytest.fixture(scope="module")
def plain(run):
    """The folder of a run too short to be drawn before its end."""
    main(run)
    return run.out


@pytest.mark.parametrize("cost", [0.3, 3.0, 40.0])
def test_drawing_takes_no_more_than_its_share_and_goes_on_all_the_while(cost, tmp_path):
    clock, drawn = Clock(), []
    live_plot = LivePlot(tmp_path, clock=clock)

    def draw():
        drawn.append(clock.now)
        clock.now += cost

    live_plot.draw = draw
    while clock.now < 20_000:
        clock.now += 7
        live_plot.update()
        assert len(drawn) < 2 or len(drawn) * cost <= MAX_TIME_SHARE * clock.now
    assert drawn[-1] > 15_000 and len(drawn) * cost > 0.8 * MAX_TIME_SHARE * clock.now


def test_every_evaluation_can_be_seen_at_once_and_the_run_is_the_same_bit_for_bit(
    run, plain, tmp_path, monkeypatch
):
    evaluations = []

    def plot_and_record(folders):
        assert plot(folders).read_bytes().startswith(b"\x89PNG")
        evaluations.append(len(select_events(read_history(folders[0] / HISTORY_FILE), "eval")))

    monkeypatch.setattr(live, "MAX_TIME_SHARE", inf)
    monkeypatch.setattr(live, "plot", plot_and_record)
    main(replace(run, out=tmp_path / "run"))
    assert evaluations == list(range(1, EVALUATIONS + 1))
    assert comparable_history(tmp_path / "run") == comparable_history(plain)
    states = [load_checkpoint(out / "moe_final.pt").state for out in (tmp_path / "run", plain)]
    assert is_identical(*states)
    assert not list((tmp_path / "run").glob(".*"))


def test_a_picture_that_cannot_be_drawn_warns_once_and_the_run_goes_on(
    run, plain, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    monkeypatch.setattr(live, "MAX_TIME_SHARE", inf)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    main(replace(run, out=out))
    output = capsys.readouterr()
    warnings = [line for line in (output.out + output.err).splitlines() if "warning" in line]
    start = f"warning: drawing {out / PLOT_FILE} failed (ModuleNotFoundError: "
    assert len(warnings) == 2, "one while it goes on, one at its end"
    assert all(line.startswith(start) for line in warnings)
    assert all(line.endswith("); the run goes on without it") for line in warnings)
    assert "curves:" not in output.out
    assert comparable_history(out) == comparable_history(plain)


def test_a_run_killed_between_its_end_and_its_last_picture_gets_that_on_a_resume(run, plain):
    picture = plain / PLOT_FILE
    complete = picture.read_bytes()
    picture.write_bytes(b"drawn before the end")
    os.utime(picture, ns=(0, 0))
    for _ in range(2):
        main(replace(run, resume=True))
        again = plot([plain], plain / "again.png")
        assert picture.read_bytes() == complete == again.read_bytes()
        again.unlink()
