"""Several runs on the same axes: which one got furthest with the same tokens, FLOPs or hours."""

from collections.abc import Mapping
from itertools import cycle, product
from typing import TYPE_CHECKING

import numpy as np

from utils.metrics.history import select_events
from utils.plot.axis import series, split_phases
from utils.plot.losses import (
    LOSS_FIELDS,
    LOSS_LABEL,
    corpus_name,
    elapsed_time,
    final_loss,
    loss_limits,
)
from utils.runtime.formatting import format_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RUN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""The palette of Okabe and Ito, which color-blind eyes tell apart."""
LINE_STYLES = ("-", "--", ":")
GROWTH_MARKERS = {"Upcycle": "D", "Widen": "s", "Deepen": "^"}


def draw_comparison(axes: "Axes", runs: Mapping[str, list[dict]]) -> None:
    """Draws the losses of several runs, given their placed events by name, and marks each growth
    with its operator."""
    styles = cycle(product(LINE_STYLES, RUN_COLORS))
    for (name, events), (style, color) in zip(runs.items(), styles, strict=False):
        training, validation = (series(events, *item) for item in LOSS_FIELDS.items())
        label = f"{name}: {final_loss(events)} in {elapsed_time(events)} on {corpus_name(events)}"
        axes.plot(*training, color=color, alpha=0.2, linewidth=1)
        # The legend leaves out labels that begin with an underscore.
        axes.plot(
            *validation, style, color=color, linewidth=2, label=format_name(label).lstrip("_")
        )
        for grow in select_events(events, "grow"):
            y = np.interp(grow["x"], *(validation if validation[0].size else training))
            marker = GROWTH_MARKERS[grow["growth"]]
            axes.plot(grow["x"], y, marker, color=color, markeredgecolor="white", markersize=9)
    growths = {e["growth"] for events in runs.values() for e in select_events(events, "grow")}
    for growth in sorted(growths, key=list(GROWTH_MARKERS).index):
        axes.plot([], [], GROWTH_MARKERS[growth], color="black", label=growth)
    axes.set_title(f"Validation loss of {len(runs)} runs", size=12, weight="bold")
    axes.set_ylabel(LOSS_LABEL)
    axes.set_ylim(loss_limits([split_phases(events) for events in runs.values()]))
    axes.legend()
