"""Several runs on the same axes: which one got furthest with the same tokens, FLOPs or hours."""

from collections.abc import Mapping, Sequence
from itertools import cycle, product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from utils.metrics.history import run_record, select_events
from utils.plot.axis import series, split_phases
from utils.plot.losses import (
    LOSS_FIELDS,
    LOSS_LABEL,
    ORANGE,
    best_valid_loss,
    corpus_name,
    elapsed_time,
    final_loss,
    loss_limits,
    mark_exits,
)
from utils.runtime.formatting import format_name, list_some, wrap_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RUN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""The palette of Okabe and Ito, which color-blind eyes tell apart."""
LINE_STYLES = ("-", "--", ":")
GROWTH_MARKERS = {"Upcycle": "D", "Widen": "s", "Deepen": "^"}
MARKER_SIZE, RING_SIZE = 9, 5
"""Size of a marker in points, and how much larger one is for each that lies on it."""
NEAR = 0.01
"""Share of the axes within which markers lie on one another."""
WARNING_WIDTH = 120
"""Letters in a line of a warning."""


def choose_loss(histories: Sequence[list[dict]]) -> tuple[str, str]:
    """Returns the field of `eval` events in which the losses of some runs are compared, and a
    warning where these runs have not read the same tokens; empty where they have.

    Losses in nats per token cannot be compared between vocabularies: the longer the tokens, the
    higher the loss of each. Bits per byte can, if all runs have recorded them.
    """
    records = [run_record(events) for events in histories]
    if len({record["fingerprint"] for record in records}) < 2:
        return "valid_loss", ""
    texts = sorted({corpus_name(events) for events in histories})
    sizes = sorted({record["config"]["model"]["vocab_size"] for record in records})
    differences = []
    if len(texts) > 1:
        differences.append(f"texts ({list_some(texts)})")
    if len(sizes) > 1:
        differences.append(f"vocabularies ({list_some(f'{size:,}' for size in sizes)} tokens)")
    difference = " and ".join(differences) or "texts or tokenizers"
    warning = f"WARNING: the runs have different {difference}"
    evals = (select_events(events, "eval") for events in histories)
    if not all(any(event.get("bits_per_byte") for event in events) for events in evals):
        reason = "not all of them have recorded bits per byte"
        return "valid_loss", f"{warning}: nats per token cannot be compared, and {reason}."
    caution = ", though one text may be harder than another" if len(texts) > 1 else ""
    return "bits_per_byte", f"{warning}: bits per byte can be compared{caution}."


def draw_comparison(axes: "Axes", runs: Mapping[str, list[dict]]) -> None:
    """Draws the losses of several runs, given their placed events by name, and marks each growth
    with its operator. Says so where the runs have not read the same tokens."""
    field, warning = choose_loss([*runs.values()])
    # The bytes of training text are not counted: its losses are shown in nats only.
    fields = LOSS_FIELDS if field == "valid_loss" else dict.fromkeys(LOSS_FIELDS, field)
    limits = loss_limits([split_phases(events) for events in runs.values()], fields)
    axes.set_ylim(limits)
    styles = cycle(product(LINE_STYLES, RUN_COLORS))
    growths: list[GrowthMark] = []
    has_training = False
    pale = {"alpha": 0.25, "linewidth": 1}
    for (name, events), (style, color) in zip(runs.items(), styles, strict=False):
        training, validation = (series(events, *item) for item in fields.items())
        label = f"{name}: {describe_end(events, field)} on {corpus_name(events)}"
        axes.plot(*training, color=color, **pale)
        has_training |= training[0].size > 0
        # The legend leaves out labels that begin with an underscore.
        axes.plot(
            *validation, style, color=color, linewidth=2, label=format_name(label).lstrip("_")
        )
        for grow in select_events(events, "grow"):
            y = np.interp(grow["x"], *(validation if validation[0].size else training))
            growths.append(GrowthMark(grow["x"], float(y), grow["growth"], color))
    if has_training:
        axes.plot([], [], color="black", label="pale: loss on training text", **pale)
    mark_exits([axes])
    draw_growths(axes, growths)
    axes.set_ylabel(LOSS_LABEL if field == "valid_loss" else "loss (bits per byte)")
    lines = wrap_lines(format_name(warning), indent=0, width=WARNING_WIDTH).splitlines()
    axes.set_title(
        f"Validation loss of {len(runs)} runs", size=12, weight="bold", pad=7 + 12 * len(lines)
    )
    above = {"xycoords": "axes fraction", "xytext": (0, 5), "textcoords": "offset points"}
    axes.annotate("\n".join(lines), (0, 1), color=ORANGE, size=8.5, **above)
    axes.legend()


def describe_end(events: list[dict], field: str) -> str:
    """Returns how far a run got and in what time, in words, given the field of `eval` events that
    holds its loss."""
    outcome = final_loss(events)
    if field == "bits_per_byte":
        evaluated = select_events(events, "eval")[-1]
        outcome = f"{best_valid_loss(evaluated, field):.3f} bits per byte"
    return f"{outcome} in {elapsed_time(events)}"


class GrowthMark(NamedTuple):
    """Where on the axes a run grew."""

    x: float
    y: float
    growth: str
    """The operator's name."""
    color: str


def draw_growths(axes: "Axes", growths: Sequence[GrowthMark]) -> None:
    """Draws a marker for each growth, and their legend. One that lies on others is drawn around
    them, so that all of them are seen."""
    places = np.array([(mark.x, mark.y) for mark in growths]).reshape(-1, 2)
    places /= np.ptp([axes.get_xlim(), axes.get_ylim()], axis=1)
    for index, mark in enumerate(growths):
        is_near = np.abs(places[index + 1 :] - places[index]).max(1) < NEAR
        size = MARKER_SIZE + RING_SIZE * int(is_near.sum())
        marker = GROWTH_MARKERS[mark.growth]
        axes.plot(
            mark.x, mark.y, marker, color=mark.color, markeredgecolor="white", markersize=size
        )
    for growth in sorted({mark.growth for mark in growths}, key=list(GROWTH_MARKERS).index):
        axes.plot([], [], GROWTH_MARKERS[growth], color="black", label=f"growth: {growth}")
