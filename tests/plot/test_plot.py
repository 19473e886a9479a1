import subprocess
import sys
from itertools import combinations
from math import exp
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text
from numpy.testing import assert_allclose

from config import InputError
from utils.metrics.history import HISTORY_FILE, PLOT_FILE, select_events, write_history
from utils.plot.axis import X_LABELS, format_x, place_events, split_phases
from utils.plot.figure import make_figure, plot
from utils.plot.losses import EXIT_ARROW, loss_change
from utils.plot.panels import describe_copies, describe_load, describe_recovery

ROOT = Path(__file__).parents[2]
FULL = {
    "dense": (None, 1000, 2048),
    "moe": ("Upcycle", 1000, 2048),
    "wide": ("Widen", 500, 512),
    "deep": ("Deepen", 500, 256),
}
"""Growth, steps and tokens in a step of each phase."""
SCRATCH = {"deep": (None, 650, 2048)}
TWO = {"dense": (None, 300, 2048), "moe": ("Upcycle", 20, 2048)}
EIGHT = {f"stage{i}": ("Deepen" if i else None, 100, 2048 if i else 512) for i in range(8)}
UNTRAINED = {"dense": (None, 1000, 2048), "moe": ("Upcycle", 0, 2048), "wide": ("Widen", 0, 2048)}
SCHEDULES = {"full": FULL, "scratch": SCRATCH, "two": TWO, "eight": EIGHT, "untrained": UNTRAINED}

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def make_history(schedule, rise=0.0, has_evals=True, has_routing=True, **run):
    """Returns a history as training writes it, with a loss that falls from 11 towards 2, and that
    is `rise` higher right after each growth."""
    record = {"corpus": "tinystories", "device": "cpu", "fallback": False}
    record |= {"fingerprint": "f0", "config": {"model": {"vocab_size": 300}}}
    record |= {"params": [932_000_000] * 8, "active_params": [309_000_000] * 8}
    record |= {"flops_per_token": [10**phase for phase in range(1, 9)]}
    events = [{"event": "run", "wall_s": 0.0, **record, **run}]
    tokens, loss = 0, 11.0

    def append(event, **values):
        events.append({"event": event, "wall_s": float(len(events)), **values})

    for phase, (name, (growth, steps, batch)) in enumerate(schedule.items(), start=1):
        where, before = {"phase": phase, "phase_name": name}, loss
        routing = {}
        if phase > 1 and has_routing:
            load = [[0.4, 0.3, 0.29, 0.01], [0.25] * 4] * phase
            routing = {"expert_load": load, "expert_distance": 0.1 * phase, "copy_distance": 0.2}
        if growth:
            drift = {"loss_drift": 3e-7 + rise, "max_logit_diff": 2e-5}
            append("grow", growth=growth, tokens=tokens, valid_loss_fp32=before, **where, **drift)
        for step in range(0, steps + 1, 10):
            tokens += 10 * batch if step else 0
            loss = 2 + 9 * exp(-tokens / 2e5) + (rise * exp(-step / 50) if growth else 0.0)
            if has_evals and step % 100 == 0:
                values = routing | ({"above_growth": loss - before} if growth else {})
                append("eval", step=step, tokens=tokens, valid_loss=loss, **where, **values)
            if step:
                noise = 0.05 * (-1) ** (step // 10)
                append("step", step=step, tokens=tokens, loss=loss + noise, **where)
        append("checkpoint", loss=9.0, valid_loss=9.0, **where)
    append("end", tokens=tokens)
    return events


def write_run(folder, events):
    folder.mkdir(parents=True)
    write_history(folder / HISTORY_FILE, events)
    return folder


def select_evals(events, phase):
    return [e for e in events if e["event"] == "eval" and e["phase"] == phase]


def axes_grid(figure, schedule):
    """The axes of the picture of one run: a row for each panel, a column for each phase."""
    columns = len(schedule)
    axes = figure.axes[: len(figure.axes) // columns * columns]
    return [axes[i : i + columns] for i in range(0, len(axes), columns)]


def drawn_texts(figure):
    """All texts of a picture but the numbers of axes at places that are out of view."""
    out_of_view = [
        tick.label1
        for axes in figure.axes
        for axis, ends in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))
        for tick in axis.get_major_ticks()
        if not min(ends) <= tick.get_loc() <= max(ends)
    ]
    return [
        text
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip() and text not in out_of_view
    ]


def header(axes):
    return axes.get_title(loc="left").split("\n")


def title(figure):
    return figure.get_suptitle()


@every_schedule
def test_every_phase_has_a_header_and_every_growth_says_how_far_it_moved_the_model(schedule):
    losses = axes_grid(make_figure({"run": make_history(schedule)}), schedule)[0]
    for number, (name, axes) in enumerate(zip(schedule, losses, strict=True), start=1):
        growth, _, _ = schedule[name]
        drift = [f"{growth}: ∆loss 3e-7", "∆logits 2e-5"]
        assert header(axes)[0].startswith(f"{number} {name}, ")
        assert header(axes)[1] == "309 M of 932 M params"
        assert (header(axes)[-2:] == drift) == (growth is not None)


def test_a_growth_that_broke_the_model_says_so():
    events = make_history(TWO)
    for event in events:
        if event["event"] == "grow":
            event |= {"loss_drift": None, "max_logit_diff": None}
    grown = axes_grid(make_figure({"run": events}), TWO)[0][1]
    assert header(grown)[-2:] == ["Upcycle: ∆loss not finite", "∆logits not finite"]


@every_schedule
@pytest.mark.parametrize("unit", X_LABELS)
def test_no_text_covers_another_or_leaves_the_picture_however_short_the_phases(schedule, unit):
    figure = make_figure({"run": make_history(schedule, 0.4)}, unit)
    figure.draw_without_rendering()
    texts = [(text.get_text(), text.get_window_extent()) for text in drawn_texts(figure)]
    assert len(texts) > len(schedule)
    for name, box in texts:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, name
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, name
    for (name, box), (other_name, other_box) in combinations(texts, 2):
        assert not box.overlaps(other_box), (name, other_name)


def test_a_long_title_is_broken_into_lines():
    figure = make_figure({"run": make_history(FULL, corpus="/a long path" * 20)})
    figure.draw_without_rendering()
    assert figure.get_suptitle().startswith("/a long path")
    (suptitle,) = (text for text in figure.texts if "/a long path" in text.get_text())
    assert suptitle.get_window_extent().x1 <= figure.bbox.x1


@every_schedule
@pytest.mark.parametrize("unit", X_LABELS)
def test_every_phase_has_a_linear_axis_around_its_own_events(schedule, unit):
    figure = make_figure({"run": make_history(schedule)}, unit)
    phases = split_phases(place_events(make_history(schedule), unit))
    for row in axes_grid(figure, schedule):
        for axes, phase in zip(row, phases, strict=True):
            left, right = axes.get_xlim()
            start, end = phase.x_range
            assert axes.get_xscale() == "linear" and left < start <= end < right


def test_short_phases_have_as_much_room_as_long_ones():
    figure = make_figure({"run": make_history(FULL)})
    figure.draw_without_rendering()
    for row in axes_grid(figure, FULL):
        assert_allclose([axes.bbox.width for axes in row], row[0].bbox.width, rtol=1e-6)


def test_a_growth_that_hurt_is_seen_whole_and_the_first_steps_do_not_squash_it():
    events = make_history(FULL, rise=3.0)
    low, high = make_figure({"run": events}).axes[0].get_ylim()
    losses = [e["valid_loss"] for e in events if e["event"] == "eval"]
    assert low < min(losses) and high < losses[0]
    assert all(loss < high for loss in losses[2:])


def test_a_run_that_begins_with_a_growth_is_seen_from_there_on():
    events = make_history({"wide": ("Widen", 500, 512)})
    _, high = make_figure({"a": events, "b": events}).axes[0].get_ylim()
    assert high > max(e["valid_loss"] for e in events if e["event"] == "eval")


def test_the_losses_of_a_model_that_learns_its_text_by_heart_are_all_seen():
    events = make_history(FULL)
    for event in events:
        if "loss" in event:
            event["loss"] /= 10
    _, high = make_figure({"run": events}).axes[0].get_ylim()
    late = [e["valid_loss"] for e in events if e["event"] == "eval" and e["phase"] > 1]
    assert high > max(late)


def test_a_collapse_does_not_squash_the_losses_before_it():
    events = make_history(FULL)
    events[-3]["loss"] = 1000.0
    _, high = make_figure({"run": events}).axes[0].get_ylim()
    assert high < 10


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("length", [2, 3, 40, 114, 300])
@pytest.mark.parametrize("has_evals", [True, False])
def test_a_run_cut_off_anywhere_is_drawn_and_called_unfinished(length, has_evals):
    events = make_history(FULL, has_evals=has_evals)[:length]
    assert "so far" in title(make_figure({"run": events}))


def test_a_finished_run_says_what_it_read_where_it_ran_and_how_far_it_got():
    events = make_history(SCRATCH, corpus="builtin", device="NVIDIA H100")
    expected = "built-in stories on NVIDIA H100, 74 s: validation loss 2.02"
    assert title(make_figure({"run": events})) == expected


def test_a_finished_run_says_how_much_of_its_time_its_steps_took():
    *events, end = make_history(SCRATCH)
    figure = make_figure({"run": [*events, end | {"steps_s": 50.0, "start_s": 24.0}]})
    assert ", 74 s (50 s of steps): " in title(figure)


def test_the_loss_that_is_told_is_that_on_the_most_text():
    *others, last, end = make_history(SCRATCH)
    evals = [event for event in (*others, last) if event["event"] == "eval"]
    evals[-1]["final_valid_loss"] = 3.21
    figure = make_figure({"run": [*others, last, end]})
    assert title(figure).endswith("validation loss 3.21")
    assert "valid loss 3.21 " in header(axes_grid(figure, SCRATCH)[0][0])[2]


def test_stories_that_nobody_asked_for_are_named_in_the_title():
    figure = make_figure({"run": make_history(SCRATCH, corpus="builtin", fallback=True)})
    assert title(figure).startswith("BUILT-IN STORIES (hub not reachable)")


def test_runs_are_told_apart_by_color_and_name_whatever_their_phases():
    scratch, unfinished = make_history(SCRATCH), make_history(FULL)[:20]
    figure = make_figure({"a": make_history(FULL), "_b$x_$": scratch, "c": unfinished})
    figure.draw_without_rendering()
    legend = figure.axes[0].get_legend()
    runs, others = np.split([text.get_text() for text in legend.get_texts()], [3])
    assert [label.split(":")[0] for label in runs] == ["a", "b$x_$", "c"]
    assert list(others) == [
        "pale: loss on training text",
        "higher, up to 11",
        "growth: Upcycle",
        "growth: Widen",
        "growth: Deepen",
    ]
    assert len({line.get_color() for line in legend.get_lines()[:3]}) == 3


def test_many_runs_are_told_apart_and_their_names_cover_no_run_that_has_room_elsewhere():
    figure = make_figure({f"run {i}": make_history(SCRATCH) for i in range(9)})
    figure.draw_without_rendering()
    axes = figure.axes[0]
    legend = axes.get_legend()
    runs = legend.get_lines()[:9]
    assert len({(line.get_color(), line.get_linestyle()) for line in runs}) == 9
    box = legend.get_window_extent()
    for line in axes.lines:
        ends = axes.transData.transform(line.get_xydata()[-20:])
        assert not any(box.contains(x, y) for x, y in ends)


@pytest.mark.parametrize("unit", X_LABELS)
def test_a_comparison_marks_each_growth_with_its_operator_where_it_happened(unit):
    events = make_history(FULL)
    figure = make_figure({"grown": events, "scratch": make_history(SCRATCH)}, unit)
    growths = [event["x"] for event in place_events(events, unit) if event["event"] == "grow"]
    for marker, x in zip("Ds^", growths, strict=True):
        assert [line.get_xdata() for line in marked(figure, marker)] == [[x]]


def marked(figure, marker):
    """The lines of a comparison that consist of a marker; not those that only the legend shows."""
    lines = figure.axes[0].lines
    return [line for line in lines if line.get_marker() == marker and len(line.get_xdata())]


def test_growths_at_one_place_lie_around_each_other_so_that_each_is_seen():
    alike = {name: make_history(FULL) for name in "abc"}
    figure = make_figure(alike | {"worse": make_history({"dense": FULL["dense"], **TWO})})
    *together, apart = (line.get_markersize() for line in marked(figure, "D"))
    assert together == sorted(set(together), reverse=True) and len(together) == 3
    assert apart == together[-1]


def arrows(axes):
    """The places along the axis at which arrows say that a curve leaves through the upper edge."""
    lines = [line for line in axes.lines if line.get_marker() == EXIT_ARROW["marker"]]
    assert all(np.all(line.get_ydata() == 1) for line in lines if len(line.get_ydata()))
    return [x for line in lines for x in line.get_xdata()]


def test_a_curve_has_an_arrow_where_it_leaves_the_plot_and_nowhere_else():
    losses = axes_grid(make_figure({"run": make_history(FULL)}), FULL)[0]
    _, top = losses[0].get_ylim()
    curves = losses[0].lines[:2]
    assert len(arrows(losses[0])) == len(curves)
    for line, x in zip(curves, arrows(losses[0]), strict=True):
        assert np.interp(-top, -line.get_ydata(), line.get_xdata()) == pytest.approx(x, rel=0.05)
    assert not any(map(arrows, losses[1:]))
    assert "higher, up to 11" in [text.get_text() for text in losses[0].get_legend().get_texts()]


def test_a_phase_all_of_which_is_out_of_view_has_an_arrow_for_each_curve():
    events = make_history(FULL)
    for event in events:
        if event.get("phase") == 3 and "step" in event:
            name = "loss" if event["event"] == "step" else "valid_loss"
            event[name] = 1000.0
    losses = axes_grid(make_figure({"run": events}), FULL)[0]
    assert len(arrows(losses[2])) == 2


def make_bits(fingerprint, vocab_size, text_bytes=1.0, **run):
    """A history that has read other tokens than others, with bits per byte if a token has bytes."""
    config = {"model": {"vocab_size": vocab_size}}
    events = make_history(SCRATCH, fingerprint=fingerprint, config=config, **run)
    for event in select_events(events, "eval") if text_bytes else []:
        event["bits_per_byte"] = event["valid_loss"] / text_bytes
    return events


def comparison(**runs):
    """The axes of a comparison, and what is said above them."""
    (axes,) = make_figure(runs).axes
    warning = " ".join(text.get_text() for text in axes.texts).replace("\n", " ")
    return axes, warning


def test_runs_with_the_same_tokens_are_compared_in_nats_without_a_warning():
    axes, warning = comparison(a=make_bits("f0", 300), b=make_bits("f0", 300, 0.0))
    assert axes.get_ylabel() == "loss (nats per token)" and not warning


def test_runs_with_different_vocabularies_are_compared_in_bits_per_byte_and_say_so():
    long_tokens = make_bits("f1", 50_257, 4.0)
    axes, warning = comparison(a=make_bits("f0", 300), b=long_tokens)
    assert axes.get_ylabel() == "loss (bits per byte)"
    assert "different vocabularies (300, 50,257 tokens)" in warning and "harder" not in warning
    lines = [line for line in axes.lines if len(line.get_ydata()) > 2]
    assert len(lines) == 2, "there are no bits per byte of training text"
    expected = [event["bits_per_byte"] for event in select_events(long_tokens, "eval")]
    assert_allclose(lines[1].get_ydata(), expected)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[1].startswith(f"b: {expected[-1]:.3f} bits per byte in ")
    assert not any("pale" in label for label in labels)


def test_runs_with_different_texts_warn_that_one_may_be_harder():
    _, warning = comparison(a=make_bits("f0", 300), b=make_bits("f1", 300, corpus="books"))
    assert "different texts (books, tinystories)" in warning and "harder" in warning
    _, warning = comparison(a=make_bits("f0", 300), b=make_bits("f1", 300))
    assert "different texts or tokenizers" in warning


def test_where_a_run_has_no_bits_per_byte_nats_are_drawn_with_a_warning(tmp_path, capsys):
    runs = {"a": make_bits("f0", 300), "b": make_bits("f1", 400, 0.0)}
    axes, warning = comparison(**runs)
    assert axes.get_ylabel() == "loss (nats per token)"
    assert "nats per token cannot be compared" in warning
    folders = [write_run(tmp_path / name, events) for name, events in runs.items()]
    plot(folders, tmp_path / "both.png")
    assert capsys.readouterr().err == f"{warning}\n"


def test_events_are_placed_by_tokens_by_the_flops_of_these_or_by_hours():
    schedule = {"a": (None, 10, 100), "b": ("Widen", 20, 10)}
    events = make_history(schedule, flops_per_token=[3, 50])
    ends = {unit: place_events(events, unit)[-1]["x"] for unit in X_LABELS}
    hours = (events[-1]["wall_s"] - events[0]["wall_s"]) / 3600
    assert ends == {"tokens": 1200, "flops": 3 * 1000 + 50 * 200, "hours": pytest.approx(hours)}


@pytest.mark.parametrize(
    "hours, expected", [(0, "0 s"), (0.00894, "32.2 s"), (0.0253, "1.52 min"), (1.5, "1.5 h")]
)
def test_times_have_a_unit_that_fits(hours, expected):
    assert format_x(hours, "hours") == expected


@every_schedule
@pytest.mark.parametrize("unit", X_LABELS)
def test_places_never_go_back_and_no_phase_begins_before_the_last_has_ended(unit, schedule):
    events = place_events(make_history(schedule), unit)
    xs = [event["x"] for event in events if "x" in event]
    assert xs == sorted(xs) and xs[0] >= 0
    phases = split_phases(events)
    assert [phase.name for phase in phases] == list(schedule)
    edges = np.ravel([phase.x_range for phase in phases])
    assert np.all(np.diff(edges) >= 0)


def test_an_unknown_unit_is_refused_by_name():
    with pytest.raises(InputError, match="x = 'epochs' must be one of tokens, flops, hours"):
        make_figure({"run": make_history(FULL)}, "epochs")


def test_panels_are_drawn_for_what_the_history_holds():
    def labels(schedule, **options):
        figure = make_figure({"run": make_history(schedule, **options)})
        return [row[0].get_ylabel().split()[0] for row in axes_grid(figure, schedule)]

    assert labels(SCRATCH) == ["loss"]
    assert labels(FULL, has_routing=False) == ["loss", "loss"]
    assert labels(FULL) == ["loss", "loss", "load", "mean"]
    assert labels(UNTRAINED) == ["loss", "load", "mean"]


def test_every_growth_is_judged_and_every_evaluation_shows_its_load():
    figure = make_figure({"run": make_history(FULL, rise=0.5)})
    _, recovery, load, _ = axes_grid(figure, FULL)
    assert recovery[0].get_xlabel() == load[0].get_xlabel() == ""
    for column, (_, steps, _) in enumerate(FULL.values()):
        if column:
            assert recovery[column].get_xlabel().startswith("+0.500 at worst")
            mesh = load[column].collections[0].get_array()
            experts = 4 * 2 * (column + 1)
            assert mesh.shape == (experts, steps // 100 + 1)
            assert load[column].get_xlabel() == f"{column + 1} of {experts} underused"


@pytest.mark.parametrize(
    "made, now, expected",
    [
        (0.141, 0.139, "copies: flat, as different\nas they were made"),
        (0.141, 0.3, "copies: 0.14 apart when\nmade, 0.30 at the end"),
        (0.0, 0.0, "copies: still identical"),
    ],
)
def test_the_distance_of_copies_is_explained_where_it_is_drawn(made, now, expected):
    assert describe_copies(made, now) == expected
    events = make_history(FULL)
    for event in events:
        if "copy_distance" in event:
            event |= {"copy_distance": made, "expert_distance": 0.1}
    select_evals(events, 4)[-1]["copy_distance"] = now
    distances = axes_grid(make_figure({"run": events}), FULL)[-1]
    assert distances[-1].get_xlabel() == expected
    assert distances[0].get_xlabel() == ""


@pytest.mark.parametrize("inserted, is_jump", [(0.4, True), (0.1, False)])
def test_a_jump_of_the_experts_distance_at_an_insertion_is_explained(inserted, is_jump):
    events = make_history(FULL)
    for event in select_evals(events, 4):
        event["expert_distance"] = inserted
    for event in select_evals(events, 3)[1:]:
        event["expert_distance"] = 0.15 if is_jump else 0.1
    *others, deepened = axes_grid(make_figure({"run": events}), FULL)[-1]
    assert ("new blocks are unrelated" in deepened.get_xlabel()) == is_jump
    assert not any("unrelated" in axes.get_xlabel() for axes in others)


def test_settings_that_changed_on_the_way_are_in_the_legend():
    events = make_history(FULL)
    change = {"event": "change", "phase": 3, "phase_name": "wide", "wall_s": 300.0}
    place = next(i for i, event in enumerate(events) if event.get("phase") == 4)
    events.insert(place, change | {"step": 500, "tokens": events[place]["tokens"]})
    legend = make_figure({"run": events}).axes[0].get_legend()
    assert "other settings from here" in [text.get_text() for text in legend.get_texts()]


def test_the_load_of_experts_that_are_all_used_is_described_by_its_extremes():
    expected = "all used, 0.50 to\n1.50 of an even share"
    assert describe_load(np.array([[0.5, 1.5], [1.0, 1.0]])) == expected


@pytest.mark.parametrize(
    "above, expected",
    [
        ([4e-8, -0.1, -0.2], "not worse at\nany evaluation"),
        ([0, 0.001, -0.2], "+0.001 at worst,\nmade up after 2 k"),
        ([0, -0.1, 0.25, 0.2], "+0.250 at worst,\nnot made up so far"),
        ([0.5, 0.3, -0.1], "+0.500 at worst,\nmade up after 2 k"),
    ],
)
def test_a_growth_is_judged_by_its_worst_loss_and_by_when_that_was_made_up(above, expected):
    xs = 1000.0 * np.arange(5, 5 + len(above))
    assert describe_recovery(xs, np.array(above), "tokens") == expected


def test_what_a_growth_itself_cost_is_part_of_what_its_phase_brought():
    """A jump of 3 that is all but made up in the phase is no gain of 3."""
    events = make_history(FULL, rise=3.0)
    phases = split_phases(place_events(events, "tokens"))
    final = [select_evals(events, number)[-1]["valid_loss"] for number in range(1, 5)]
    changes = [loss_change(phase) for phase in phases]
    assert_allclose(changes, np.diff(final, prepend=11.0), atol=1e-12)
    assert all(abs(change) < 0.1 for change in changes[1:])
    losses = axes_grid(make_figure({"run": events}), FULL)[0]
    for axes, loss, change in zip(losses, final, changes, strict=True):
        assert header(axes)[2] == f"valid loss {loss:.2f} ({change:+.2f})"


def test_the_same_history_gives_the_same_bytes_and_leaves_nothing_else_behind(tmp_path):
    folder = write_run(tmp_path / "run", make_history(SCRATCH))
    picture = plot([folder]).read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert plot([folder]).read_bytes() == picture
    assert sorted(path.name for path in folder.iterdir()) == [PLOT_FILE, HISTORY_FILE]


def test_several_runs_go_to_one_picture_also_when_their_folders_share_a_name(tmp_path):
    folders = [write_run(tmp_path / name / "run", make_history(SCRATCH)) for name in "ab"]
    target = tmp_path / "both.svg"
    assert plot(folders, target) == target
    assert all(str(folder) in target.read_text() for folder in folders)


def test_what_cannot_be_drawn_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent.*training_history\.jsonl"):
        plot([tmp_path / "absent"])
    with pytest.raises(InputError, match="empty: its history holds no losses"):
        plot([write_run(tmp_path / "empty", [])])
    run = write_run(tmp_path / "run", make_history(SCRATCH))
    for picture in (tmp_path / "curves.doc", tmp_path / "nowhere" / "curves.png"):
        with pytest.raises(InputError, match=str(picture)):
            plot([run], picture)


def test_a_picture_that_cannot_be_written_is_named(tmp_path):
    run, target = write_run(tmp_path / "run", make_history(SCRATCH)), tmp_path / "folder.png"
    target.mkdir()
    with pytest.raises(InputError, match=r"folder.png cannot be written \(Is a directory\)"):
        plot([run], target)


def test_the_command_answers_an_error_with_one_line_and_loads_matplotlib_only_to_draw(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "utils.plot", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert result.returncode == 2 and len(lines) == 1 and str(tmp_path) in lines[0]
    assert "matplotlib" not in result.stderr
