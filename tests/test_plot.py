import subprocess
import sys
from itertools import combinations
from math import exp
from pathlib import Path

import numpy as np
import pytest

from config import InputError
from utils.history import History
from utils.plot import figure, plot, set_token_axis, smooth

ROOT = Path(__file__).parents[1]
FULL = {
    "dense": (None, 1000, 2048),
    "moe": ("Upcycle", 1000, 2048),
    "wide": ("Widen", 500, 512),
    "deep": ("Deepen", 500, 256),
}
SCRATCH = {"deep": (None, 650, 2048)}
MANY = {f"stage{i}": ("Deepen" if i else None, 100, 2048 if i else 512) for i in range(8)}
STILL = {"dense": (None, 1000, 2048), "moe": ("Upcycle", 0, 2048), "wide": ("Widen", 0, 2048)}

schedules = pytest.mark.parametrize("schedule", [FULL, SCRATCH, MANY, STILL])


def record(schedule, hurt=0.0, evaluated=True, **run):
    """A history as training writes it, with a loss that starts at 11 and falls to 2."""
    told = {"corpus": "tinystories", "device": "cpu", "fallback": False} | run
    events = [{"event": "run", "wall_s": 0.0, **told}]
    tokens = 0

    def tell(event, **values):
        events.append({"event": event, "wall_s": float(len(events)), **values})

    for phase, (name, (how, steps, batch)) in enumerate(schedule.items(), start=1):
        where = {"phase": phase, "phase_name": name}
        if how:
            drift = {"loss_drift": 3e-7 + hurt, "max_logit_diff": 2e-5}
            size = {"params_before": 10**phase, "params_after": 10 ** (phase + 1)}
            tell("grow", how=how, tokens=tokens, **where, **drift, **size)
        for step in range(0, steps + 1, 10):
            tokens += 10 * batch if step else 0
            loss = 2 + 9 * exp(-tokens / 2e5) + (hurt * exp(-step / 50) if how else 0.0)
            if evaluated and step % 100 == 0:
                tell("eval", step=step, tokens=tokens, valid_loss=loss, **where)
            if step:
                noise = 0.05 * (-1) ** (step // 10)
                tell("step", step=step, tokens=tokens, loss=loss + noise, **where)
        tell("checkpoint", loss=9.0, valid_loss=9.0, **where)
    tell("end", tokens=tokens)
    return events


def written(folder, events):
    folder.mkdir()
    with History(folder / "training_history.jsonl") as history:
        for event in events:
            history(**event)
    return folder


def texts(drawing):
    return [text.get_text() for text in drawing.axes[0].texts]


def title(drawing):
    return drawing.axes[0].get_title(loc="left")


@schedules
def test_every_phase_is_named_and_every_transition_is_marked_with_its_drift(schedule):
    shown = texts(figure({"run": record(schedule)}))
    for number, (name, (how, _, _)) in enumerate(schedule.items(), start=1):
        assert f"{number} {name}" in shown
        assert shown.count(f"{how}\nΔloss 3e-7\nΔlogits 2e-5") == sum(
            how is not None and how == other for other, _, _ in schedule.values()
        )


@schedules
def test_no_label_covers_another_however_short_the_phase(schedule):
    events = record(schedule, params=[932_000_000] * 8, active_params=[309_000_000] * 8)
    drawing = figure({"run": events})
    drawing.canvas.draw()
    boxes = [(t.get_text(), t.get_window_extent()) for t in drawing.axes[0].texts if t.get_text()]
    for (one, box), (other, other_box) in combinations(boxes, 2):
        assert not box.overlaps(other_box), (one, other)


def test_the_end_of_each_phase_tells_its_validation_loss():
    events = record(FULL)
    last = {e["phase"]: f"{e['valid_loss']:.2f}" for e in events if e["event"] == "eval"}
    assert set(last.values()) <= set(texts(figure({"run": events})))


def test_a_transition_that_hurt_is_seen_whole_and_the_first_steps_do_not_squash_it():
    events = record(FULL, hurt=3.0)
    low, high = figure({"run": events}).axes[0].get_ylim()
    losses = [e["valid_loss"] for e in events if e["event"] == "eval"]
    assert low < min(losses) and high < losses[0]
    assert all(loss < high for loss in losses[1:])


@pytest.mark.parametrize("kept", [2, 3, 40, 114, 300])
@pytest.mark.parametrize("evaluated", [True, False])
def test_a_run_cut_off_anywhere_is_drawn_and_said_to_be_unfinished(kept, evaluated):
    events = record(FULL, evaluated=evaluated)[:kept]
    assert "so far" in title(figure({"run": events}))


def test_a_finished_run_says_what_it_read_where_it_ran_and_how_far_it_got():
    drawing = figure({"run": record(SCRATCH, corpus="builtin", device="NVIDIA H100")})
    assert title(drawing) == "built-in stories on NVIDIA H100, 74 s: validation loss 2.02"


def test_stories_that_nobody_asked_for_are_said_in_the_title():
    drawing = figure({"run": record(SCRATCH, corpus="builtin", fallback=True)})
    assert title(drawing).startswith("BUILT-IN STORIES (hub not reachable)")


def test_runs_are_told_apart_by_colour_and_name_whatever_their_phases():
    runs = {"grown": record(FULL), "_scratch$x_$": record(SCRATCH), "cut": record(FULL)[:20]}
    drawing = figure(runs)
    drawing.canvas.draw()
    legend = drawing.axes[0].get_legend()
    named = [text.get_text().split(":")[0] for text in legend.get_texts()]
    assert named == ["grown", "scratch$x_$", "cut", "grown here"]
    assert len({line.get_color() for line in legend.get_lines()}) == len(named)
    marks = [line for line in drawing.axes[0].lines if line.get_marker() == "D"]
    assert [len(line.get_xdata()) for line in marks] == [3, 0, 0, 0]


@pytest.mark.parametrize("edges", [[0, 10], [0, 300, 450, 550, 650], [0, 2048, 4096, 4352, 4353]])
def test_the_token_axis_keeps_order_gives_each_phase_room_and_says_when_it_stretches(edges):
    axes = figure({"run": record(SCRATCH)}).axes[0]
    axes.set_xlabel("training tokens")
    set_token_axis(axes, edges)
    places = axes.transAxes.inverted().transform(
        axes.transData.transform([(edge, 0) for edge in edges])
    )[:, 0]
    widths = np.diff(places)
    assert widths.min() > 0.1
    honest = np.allclose(widths / widths.sum(), np.diff(edges) / edges[-1])
    assert ("wider" in axes.get_xlabel()) == (not honest)


def test_smoothing_keeps_straight_lines_and_ends_and_spares_few_points():
    tokens = np.arange(100.0)
    np.testing.assert_allclose(smooth(tokens, 3 - 0.01 * tokens)[1], 3 - 0.01 * tokens)
    noisy = 3 + np.random.default_rng(0).normal(size=100)
    smoothed = smooth(tokens, noisy)[1]
    assert smoothed[0] == noisy[0] and smoothed[-1] == noisy[-1]
    assert np.diff(smoothed[10:-10]).std() < np.diff(noisy).std() / 3
    assert smooth(tokens[:9], noisy[:9])[1].size == 0


def test_the_same_history_gives_the_same_bytes_and_leaves_nothing_else_behind(tmp_path):
    folder = written(tmp_path / "run", record(SCRATCH))
    picture = plot([folder])
    first = picture.read_bytes()
    assert first.startswith(b"\x89PNG")
    assert plot([folder]).read_bytes() == first
    assert sorted(path.name for path in folder.iterdir()) == [
        "training_curves.png",
        "training_history.jsonl",
    ]


def test_several_runs_go_to_one_picture_also_when_their_folders_share_a_name(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    folders = [written(tmp_path / name / "run", record(SCRATCH)) for name in "ab"]
    target = tmp_path / "both.png"
    assert plot(folders, target) == target and target.exists()


def test_what_cannot_be_drawn_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent.*training_history\.jsonl"):
        plot([tmp_path / "absent"])
    with pytest.raises(InputError, match="empty: its history holds no losses"):
        plot([written(tmp_path / "empty", [])])
    run = written(tmp_path / "run", record(SCRATCH))
    for picture in (tmp_path / "curves.doc", tmp_path / "nowhere" / "curves.png"):
        with pytest.raises(InputError, match=str(picture)):
            plot([run], picture)


def test_the_command_answers_an_error_with_one_line_and_training_pays_for_no_matplotlib(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "utils.plot", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and len(said) == 1 and str(tmp_path) in said[0]
    assert "matplotlib" not in done.stderr
