import subprocess
import sys
from itertools import combinations
from math import exp
from pathlib import Path

import numpy as np
import pytest

from config import InputError
from utils.along import along, set_axis, stretches, text
from utils.curves import signed, smooth
from utils.history import History
from utils.panels import verdict
from utils.plot import figure, plot

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


def record(schedule, hurt=0.0, evaluated=True, measured=True, **run):
    """A history as training writes it, with a loss that starts at 11 and falls to 2, and `hurt`
    above that after each growth."""
    told = {"corpus": "tinystories", "device": "cpu", "fallback": False} | run
    told.setdefault("flops_per_token", [10**phase for phase in range(1, len(schedule) + 1)])
    events = [{"event": "run", "wall_s": 0.0, **told}]
    tokens, loss = 0, 11.0

    def inside(phase):
        """What an evaluation tells of a mixture of experts."""
        if phase == 1 or not measured:
            return {}
        load = [[0.4, 0.3, 0.29, 0.01], [0.25] * 4] * phase
        return {"expert_load": load, "expert_divergence": 0.1, "twin_distance": 0.2}

    def tell(event, **values):
        events.append({"event": event, "wall_s": float(len(events)), **values})

    for phase, (name, (how, steps, batch)) in enumerate(schedule.items(), start=1):
        where, before = {"phase": phase, "phase_name": name}, loss
        if how:
            drift = {"loss_drift": 3e-7 + hurt, "max_logit_diff": 2e-5}
            size = {"params_before": 10**phase, "params_after": 10 ** (phase + 1)}
            tell("grow", how=how, tokens=tokens, valid_loss_fp32=before, **where, **drift, **size)
        for step in range(0, steps + 1, 10):
            tokens += 10 * batch if step else 0
            loss = 2 + 9 * exp(-tokens / 2e5) + (hurt * exp(-step / 50) if how else 0.0)
            if evaluated and step % 100 == 0:
                tell("eval", step=step, tokens=tokens, valid_loss=loss, **where, **inside(phase))
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


def last(events, phase):
    """The loss that a phase ends with."""
    return [e["valid_loss"] for e in events if e["event"] == "eval" and e["phase"] == phase][-1]


def texts(drawing, panel=0):
    return [text.get_text() for text in drawing.axes[panel].texts]


def titles(drawing):
    return [axes.get_title(loc="left") for axes in drawing.axes]


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
    events = record(schedule, 0.4, params=[932_000_000] * 8, active_params=[309_000_000] * 8)
    drawing = figure({"run": events})
    drawing.canvas.draw()
    words = [text for axes in drawing.axes for text in (*axes.texts, axes._left_title)]
    boxes = [(text.get_text(), text.get_window_extent()) for text in words if text.get_text()]
    for (one, box), (other, other_box) in combinations(boxes, 2):
        assert not box.overlaps(other_box), (one, other)


@pytest.mark.parametrize("hurt", [0.0, 0.1])
def test_what_an_axis_measures_is_written_clear_of_its_numbers_and_within_the_picture(hurt):
    drawing = figure({"run": record(FULL, hurt)})
    drawing.canvas.draw()
    for axes in drawing.axes:
        label = axes.yaxis.label.get_window_extent()
        assert label.x0 > 0
        for number in axes.get_yticklabels():
            assert not label.overlaps(number.get_window_extent()), number


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


def test_the_losses_of_a_model_that_learns_its_text_by_heart_are_seen_as_well():
    events = record(FULL)
    for event in events:
        if "loss" in event:
            event["loss"] /= 10
    _, high = figure({"run": events}).axes[0].get_ylim()
    late = [e["valid_loss"] for e in events if e["event"] == "eval" and e["phase"] > 1]
    assert high > max(late)


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
    assert named == ["grown", "scratch$x_$", "cut", "Upcycle", "Widen", "Deepen"]
    assert len({line.get_color() for line in legend.get_lines()[:3]}) == 3


def test_many_runs_are_told_apart_and_their_names_cover_no_run_that_has_room_elsewhere():
    runs = {f"run {i}": record(SCRATCH) for i in range(9)}
    drawing = figure(runs)
    drawing.canvas.draw()
    axes = drawing.axes[0]
    lines = axes.get_legend().get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 9
    box = axes.get_legend().get_window_extent()
    for line in axes.lines:
        ends = axes.transData.transform(line.get_xydata()[-20:])
        assert not any(box.contains(x, y) for x, y in ends)


@pytest.mark.parametrize("unit", ["tokens", "flops", "hours"])
def test_a_comparison_marks_each_growth_with_its_operator_where_it_happened(unit):
    events = record(FULL)
    drawing = figure({"grown": events, "scratch": record(SCRATCH)}, unit)
    places = [event["at"] for event in along("grown", events, unit) if event["event"] == "grow"]
    for mark, at in zip("Ds^", places, strict=True):
        marked = [line.get_xdata() for line in drawing.axes[0].lines if line.get_marker() == mark]
        assert [list(xs) for xs in marked if len(xs)] == [[at]]


def test_the_places_are_tokens_the_work_that_they_took_or_hours():
    events = record({"a": (None, 10, 100), "b": ("Widen", 20, 10)}, flops_per_token=[3, 50])
    ends = {unit: along("run", events, unit)[-1]["at"] for unit in ("tokens", "flops", "hours")}
    assert ends == {
        "tokens": 1200,
        "flops": pytest.approx(3 * 1000 + 50 * 200, rel=1e-4),
        "hours": pytest.approx((events[-1]["wall_s"] - events[0]["wall_s"]) / 3600),
    }


@pytest.mark.parametrize(
    "hours, said", [(0, "0 s"), (0.00894, "32.2 s"), (0.0253, "1.52 min"), (1.5, "1.5 h")]
)
def test_times_are_told_in_a_unit_that_fits(hours, said):
    assert text(hours, "hours") == said


@schedules
@pytest.mark.parametrize("unit", ["tokens", "flops", "hours"])
def test_along_any_axis_places_never_go_back_and_phases_follow_each_other(unit, schedule):
    events = along("run", record(schedule), unit)
    places = [event["at"] for event in events if "at" in event]
    assert places == sorted(places) and places[0] >= 0
    phases = stretches(events)
    assert [phase.name for phase in phases] == list(schedule)
    edges = [0, *(phase.end for phase in phases)]
    assert [phase.start for phase in phases] == edges[:-1] and np.all(np.diff(edges) > 0)
    figure({"run": record(schedule)}, unit).canvas.draw()


def test_an_axis_that_a_history_does_not_tell_or_that_there_is_not_is_refused_by_name():
    old = record(FULL, flops_per_token=[])
    with pytest.raises(InputError, match=r"x = flops: the history of old .*no flops_per_token"):
        figure({"new": record(FULL), "old": old}, "flops")
    with pytest.raises(InputError, match="x = 'epochs' must be one of tokens, flops, hours"):
        figure({"old": old}, "epochs")


def test_under_the_losses_is_drawn_what_the_history_tells():
    alone = titles(figure({"run": record(SCRATCH)}))
    assert len(alone) == 1
    assert len(titles(figure({"run": record(FULL, measured=False)}))) == 2
    _, since, load, apart = titles(figure({"run": record(FULL)}))
    assert since == "Validation loss above that before the growth, in nats"
    assert load == "Load of each expert: 4 of 32 are idle"
    assert apart.endswith("twins 0.20, experts 0.10")


def test_every_growth_gets_its_verdict_and_every_evaluation_its_load():
    drawing = figure({"run": record(FULL, hurt=0.5)})
    assert len(texts(drawing, 1)) == 3
    for mesh, (_, steps, _) in zip(
        drawing.axes[2].collections[::2], [*FULL.values()][1:], strict=True
    ):
        rows, moments = mesh.get_array().shape
        assert moments == steps // 100 + 1 and rows % 8 == 0


@pytest.mark.parametrize(
    "above, said",
    [
        ([4e-8, -0.1, -0.2], "not worse at\nany evaluation"),
        ([0, 0.001, -0.2], "+0.001 at worst,\nback after 2 k"),
        ([0, -0.1, 0.25, 0.2], "+0.250 at worst,\nnot back"),
        ([0.5, 0.3, -0.1], "+0.500 at worst,\nback after 2 k"),
    ],
)
def test_the_verdict_on_a_growth_is_how_bad_it_got_and_when_that_was_made_up(above, said):
    at = 1000.0 * np.arange(5, 5 + len(above))
    assert verdict(at, np.array(above), "tokens") == said


def test_what_a_growth_itself_cost_is_part_of_what_its_phase_brought():
    """A jump of 3 that is all but made up in the phase is no gain of 3."""
    events = record(FULL, hurt=3.0)
    ends = [last(events, phase) - last(events, phase - 1) for phase in (2, 3, 4)]
    assert all(abs(end) < 0.1 for end in ends)
    drawing = figure({"run": events})
    for end in ends:
        assert any(text.startswith(f"{signed(end)} in ") for text in texts(drawing))
    assert all(text.startswith("+3.000 at worst") for text in texts(drawing, 1))


@pytest.mark.parametrize("edges", [[0, 10], [0, 300, 450, 550, 650], [0, 2048, 4096, 4352, 4353]])
def test_the_axis_keeps_order_gives_each_phase_room_and_says_when_it_stretches(edges):
    axes = figure({"run": record(SCRATCH)}).axes[0]
    set_axis(axes, edges, "tokens")
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


def test_a_picture_that_cannot_be_written_is_named(tmp_path):
    run, target = written(tmp_path / "run", record(SCRATCH)), tmp_path / "folder.png"
    target.mkdir()
    with pytest.raises(InputError, match=r"folder.png cannot be written \(Is a directory\)"):
        plot([run], target)


def test_the_command_answers_an_error_with_one_line_and_training_pays_for_no_matplotlib(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "utils.plot", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and len(said) == 1 and str(tmp_path) in said[0]
    assert "matplotlib" not in done.stderr
