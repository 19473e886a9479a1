"""Several runs on the same axes: which one got furthest with the same tokens, work or time."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from utils.along import LABELS, curve, text
from utils.curves import corpus, loss_limits, outcome, spent
from utils.history import select

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette, which stays apart for colour-blind eyes."""
DASHES = ("-", "--", ":")
"""Of as many runs each as there are colours."""
MARKS = {"Upcycle": "D", "Widen": "s", "Deepen": "^"}
"""Of the operators, where they grew the model."""


def draw_comparison(axes: "Axes", runs: Mapping[str, list[dict]], unit: str) -> None:
    axes.set_title(f"Validation loss of {len(runs)} runs", loc="left", size=12, weight="bold")
    axes.set_xlabel(LABELS[unit])
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(lambda at, _: text(at, unit))
    axes.set_ylim(*loss_limits(list(runs.values()), headroom=0.05))
    axes.margins(x=0.012)
    seen = set()
    for index, (name, events) in enumerate(runs.items()):
        label = f"{name}: {outcome(events)} in {spent(events)} on {corpus(events)}"
        label = label.lstrip("_")  # matplotlib would leave it out of the legend
        again, which = divmod(index, len(COLOURS))
        colour, dashes = COLOURS[which], DASHES[again % len(DASHES)]
        axes.plot(*curve(events, "step"), color=colour, alpha=0.2, linewidth=1)
        valid = curve(events, "eval")
        axes.plot(*valid, dashes, color=colour, linewidth=2, label=label)
        for how, mark in MARKS.items():
            at = [event["at"] for event in select(events, "grow") if event["how"] == how]
            height = np.interp(at, *(valid if len(valid[0]) else curve(events, "step")))
            axes.plot(at, height, mark, color=colour, markeredgecolor="white", markersize=9)
            seen |= {how} if at else set()
    for how in sorted(seen, key=list(MARKS).index):
        axes.plot([], [], MARKS[how], color="black", label=how)
    size = min(10, max(6.5, 80 / (len(runs) + len(seen))))
    axes.legend(loc="best", fontsize=size, edgecolor="none", framealpha=0.6)
