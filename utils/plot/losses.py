"""The losses of a run, and its course in words."""

from collections.abc import Mapping, Sequence
from math import inf, isfinite
from typing import TYPE_CHECKING

import numpy as np

from utils.metrics.history import run_record, select_events, time_spent
from utils.plot.axis import PhaseEvents, series
from utils.runtime.formatting import format_duration, format_params

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#B84600", "#009E73", "#CC79A7", "#8A929B"
"""Colors that color-blind eyes tell apart."""
LOSS_FIELDS = {"step": "loss", "eval": "valid_loss"}
"""The field that holds the loss in each kind of event: on training text, on validation text."""
LOSS_LABEL = "loss (nats per token)"
EXIT_ARROW: dict = {
    "marker": [(0, -8), (0, 0), (-2, -3), (0, 0), (2, -3)],
    "markersize": 20,
    "markeredgewidth": 1.5,
    "fillstyle": "none",
    "linestyle": "none",
}
"""Marks where a curve leaves the axes, with the tip there."""


def draw_losses(row: "Sequence[Axes]", phases: Sequence[PhaseEvents], unit: str) -> None:
    """Draws the training and the validation loss of each phase into its axes, and a dotted line
    where the run was resumed with other settings."""
    for axes, phase in zip(row, phases, strict=True):
        training, validation = (series(phase.events, *item) for item in LOSS_FIELDS.items())
        axes.plot(*training, color=GREY, linewidth=1, label="training text")
        axes.plot(*validation, "o-", color=BLUE, markersize=4, label="validation text")
    row[0].set_ylabel(LOSS_LABEL)
    row[0].set_ylim(loss_limits([phases]))
    mark_exits(row)
    for axes, phase in zip(row, phases, strict=True):
        for x in {change["x"] for change in select_events(phase.events, "change")}:
            style = {"color": "black", "linestyle": ":", "linewidth": 1}
            axes.axvline(x, **style, label="other settings from here")
    legends = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in row]
    handles = {label: handle for legend in legends for handle, label in legend}
    row[0].legend(handles.values(), handles.keys())


def mark_exits(all_axes: "Sequence[Axes]") -> None:
    """Puts an arrow on the upper edge of some axes wherever a line of theirs leaves through it, and
    says in the legend of the first how high these lines go."""
    highest = -inf
    for axes in all_axes:
        _, top = axes.get_ylim()
        for line in axes.get_lines():
            xs, ys = np.array(line.get_data(), float)
            if not np.any(ys > top):
                continue
            crossed = np.flatnonzero(np.diff(ys > top))
            shares = (top - ys[crossed]) / (ys[crossed + 1] - ys[crossed])
            exits = xs[crossed] + shares * (xs[crossed + 1] - xs[crossed])
            exits = exits if exits.size else xs.mean(keepdims=True)
            edge, color = axes.get_xaxis_transform(), line.get_color()
            axes.plot(exits, np.ones(exits.size), **EXIT_ARROW, color=color, transform=edge)
            highest = max(highest, ys.max())
    if isfinite(highest):
        label = f"higher, up to {highest:.3g}"
        all_axes[0].plot([], [], **EXIT_ARROW, color="black", label=label)


def loss_limits(
    runs: Sequence[Sequence[PhaseEvents]], fields: Mapping[str, str] = LOSS_FIELDS
) -> tuple[float, float]:
    """Returns limits around all losses of some runs, but for those of the first steps of a new
    model, near log(vocabulary), and those of a collapse.

    Args:
        runs: The phases of each run.
        fields: The field that holds the loss in each kind of event.
    """
    shown, typical = [], 0.0
    for phases in runs:
        start, end = phases[0].x_range
        is_new = not select_events(phases[0].events, "grow")
        first = start + (end - start) / 4 if is_new else start
        events = [event for phase in phases for event in phase.events]
        for kind, field in fields.items():
            xs, losses = series(events, kind, field)
            if losses.size:
                shown.extend(losses[xs >= min(first, xs[-1])])
                # Of each kind: a model that overfits has two typical losses, and no collapse.
                typical = max(typical, float(np.median(losses)))
    low, high = min(shown), min(max(shown), 3 * typical)
    margin = max(0.06 * (high - low), 0.02)
    return low - margin, high + margin


def describe_phase(phase: PhaseEvents, run: dict) -> list[str]:
    """Returns lines that say how long a phase took, its number of parameters, what it did to the
    validation loss, and how far the growth that began it moved the model on the probe batch.

    Args:
        phase: The phase.
        run: The first event of the run's history.
    """
    total, active = (run[field][phase.number - 1] for field in ("params", "active_params"))
    lines = [
        f"{phase.number} {phase.name}, {format_duration(phase.seconds)}",
        f"{format_params(total, active)} params",
    ]
    for evaluated in select_events(phase.events, "eval")[-1:]:
        lines.append(f"valid loss {best_valid_loss(evaluated):.2f} ({loss_change(phase):+.2f})")
    for grow in select_events(phase.events, "grow"):
        loss, logits = (
            "not finite" if grow[field] is None else f"{grow[field]:.2g}".replace("e-0", "e-")
            for field in ("loss_drift", "max_logit_diff")
        )
        lines += [f"{grow['growth']}: \N{INCREMENT}loss {loss}", f"\N{INCREMENT}logits {logits}"]
    return lines


def best_valid_loss(evaluated: dict, field: str = "valid_loss") -> float:
    """Returns the validation loss of an `eval` event that is measured on the most text, given the
    field that holds it for every evaluation."""
    return evaluated.get(f"final_{field}", evaluated[field])


def loss_change(phase: PhaseEvents) -> float:
    """Returns what an evaluated phase, with the growth that began it, did to the validation
    loss."""
    _, above = series(phase.events, "eval", "above_growth")
    _, losses = series(phase.events, "eval", "valid_loss")
    return above[-1] if above.size else losses[-1] - losses[0]


def corpus_name(events: list[dict]) -> str:
    """Returns the text that a run was trained on."""
    run = run_record(events)
    if run["fallback"]:
        return "BUILT-IN STORIES (hub not reachable)"
    return run["corpus"].replace("builtin", "built-in stories")


def elapsed_time(events: list[dict]) -> str:
    """Returns the time that a run took, and its steps of it, or the time that it has taken so
    far."""
    whole = format_duration(events[-1]["wall_s"])
    end = next(iter(select_events(events, "end")), None)
    if end is None:
        return f"{whole} so far"
    steps_s = time_spent(end).get("steps")
    return whole if steps_s is None else f"{whole} ({format_duration(steps_s)} of steps)"


def final_loss(events: list[dict]) -> str:
    """Returns the last validation loss of a run, or else its last training loss, in words; nothing
    if it has neither."""
    for event in select_events(events, "eval")[-1:]:
        return f"validation loss {best_valid_loss(event):.2f}"
    for event in select_events(events, "step")[-1:]:
        return f"training loss {event['loss']:.2f}"
    return ""
