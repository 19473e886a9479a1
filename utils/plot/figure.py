"""The picture of one run, or of several on the same axes.

The picture of one run has a column of axes for each phase, so that every axis is linear and a short
phase has as much room as a long one. It shows whether a growth hurt, which phase paid off, whether
the experts are used, and how far copies have moved apart. The picture of several runs shows which
of them got furthest with the same tokens, FLOPs or hours.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from config import require
from utils.metrics.history import HISTORY_FILE, PLOT_FILE, read_history, run_record
from utils.plot.axis import X_LABELS, format_x, place_events, split_phases
from utils.plot.comparison import choose_loss, draw_comparison
from utils.plot.losses import corpus_name, describe_phase, draw_losses, elapsed_time, final_loss
from utils.plot.panels import choose_panels
from utils.runtime.atomic_io import atomic_file, explain_write_errors
from utils.runtime.formatting import format_name

if TYPE_CHECKING:  # matplotlib takes long to import: a run does it when it draws, not at its start
    from matplotlib.figure import Figure

STYLE: dict = {
    "axes.labelsize": 8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 8.5,
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.parse_math": False,  # a folder may be called $x_$
    "xaxis.labellocation": "left",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
"""Settings of matplotlib. Sizes are in points."""


def import_matplotlib() -> None:
    """Imports what pictures are drawn with, which takes a second."""
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401


def plot(folders: Sequence[Path], out: Path | None = None, x: str = "tokens") -> Path:
    """Draws the curves of one run, or of several on the same axes, from the folders they wrote.
    The picture is written whole or not at all.

    Args:
        folders: Folders of runs (--out of train.py).
        out: File for the picture; its suffix chooses the format (.png, .pdf, .svg, ...). None
            writes FOLDER/training_curves.png for one run and comparison.png for several.
        x: What the horizontal axis shows: tokens, flops or hours.

    Returns:
        The path of the picture.

    Raises:
        InputError: for a folder without losses to draw, and for a file that cannot be written.
    """
    require(len(folders) > 0, "name the folder of at least one run")
    target = out or (folders[0] / PLOT_FILE if len(folders) == 1 else Path("comparison.png"))
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    histories = [read_history(folder / HISTORY_FILE) for folder in folders]
    figure = make_figure(dict(zip(names, histories, strict=True)), x)
    _, warning = choose_loss(histories)
    if warning:
        print(warning, file=sys.stderr)
    suffix, known = target.suffix.lower().lstrip("."), figure.canvas.get_supported_filetypes()
    require(suffix in known, f"{target}: the name must end in one of {', '.join(sorted(known))}")
    require(target.parent.is_dir(), f"{target}: there is no folder {target.parent}")
    with explain_write_errors(target), atomic_file(target) as file:
        figure.savefig(file, format=suffix, dpi=160)
    return target


def make_figure(runs: Mapping[str, list[dict]], unit: str = "tokens") -> "Figure":
    """Returns the picture of one run in detail, or of several compared.

    Args:
        runs: The history of each run, by its name.
        unit: What the horizontal axis shows: tokens, flops or hours.

    Raises:
        InputError: for a history without losses, and for another unit.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    for name, events in runs.items():
        require(bool(final_loss(events)), f"{name}: its history holds no losses yet")
    placed = {name: place_events(events, unit) for name, events in runs.items()}
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 5.2), layout="constrained")
        if len(runs) > 1:
            draw_comparison(figure.subplots(), placed)
        else:
            draw_run(figure, next(iter(placed.values())), unit)
        figure.supxlabel(X_LABELS[unit], size=9)
    for axes in figure.axes:
        axes.xaxis.set_major_formatter(lambda x, _: format_x(x, unit))
    return figure


def draw_run(figure: "Figure", events: list[dict], unit: str) -> None:
    """Draws the losses of a run and the panels under them, in a column of axes for each phase."""
    phases, run = split_phases(events), run_record(events)
    panels = {draw_losses: 3.4, **choose_panels(phases)}
    height = 1.4 + sum(panels.values()) + 0.45 * len(panels)
    figure.set_size_inches(max(9, 1 + 2 * len(phases)), height)
    grid = figure.subplots(
        len(panels),
        len(phases),
        sharex="col",
        sharey="row",
        squeeze=False,
        height_ratios=list(panels.values()),
    )
    headers = [describe_phase(phase, run) for phase in phases]
    lines = max(map(len, headers))
    for column, phase, header in zip(grid.T, phases, headers, strict=True):
        column[0].set_title("\n".join([*header, *[""] * (lines - len(header))]))
        start, end = phase.x_range
        margin = 0.03 * (end - start) or 0.01 * end or 1  # also around a phase without a step
        column[0].set_xlim(start - margin, end + margin)
        column[0].set_xticks(np.unique(np.linspace(start, end, 3)))
        labels = column[-1].get_xticklabels()
        for label, side in zip(labels, ("left", "center", "right"), strict=False):
            label.set_horizontalalignment(side)
    for draw, row in zip(panels, grid, strict=True):
        draw(row, phases, unit)
    source, device = corpus_name(events), run["device"]
    title = f"{source} on {device}, {elapsed_time(events)}: {final_loss(events)}"
    figure.suptitle(format_name(title), x=0.01, ha="left", wrap=True)
