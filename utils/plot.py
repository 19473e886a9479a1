"""Curves of one run, or of several on the same axes.

    python -m utils.plot FOLDER [FOLDER ...] [--x tokens|flops|hours] [--out FILE]

One run answers: did the transitions hurt, which phase paid, are the experts used. Several runs
answer which one got furthest with the same tokens, work or time.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from config import require
from utils.along import along, set_axis, stretches
from utils.cli import run_command
from utils.comparison import draw_comparison
from utils.curves import BAD, draw_losses, outcome
from utils.files import whole_file, writing
from utils.history import HISTORY, PLOT, read, select
from utils.panels import panels

if TYPE_CHECKING:  # matplotlib is slow to import: a run pays for it when it draws, not at its start
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, LEFT, RIGHT, BOTTOM, LOSSES, GAP = 9, 0.68, 0.3, 0.5, 3.64, 0.48
"""Inches: of the picture, its margins, the losses' axes, and between them and what lies under."""


def plot(folders: Sequence[Path], out: Path | None = None, x: str = "tokens") -> Path:
    """Draws the curves of one run, or of several on the same axes, from the folders they wrote.

    The picture goes to FOLDER/training_curves.png, of several runs to comparison.png, or to --out.
    It is there whole or stays as it was.

    Args:
        folders: What runs were told to write to (--out of train.py).
        out: The picture; its name's end says of what kind: .png, .pdf, .svg, ...
        x: What the runs are drawn along: tokens, flops or hours.
    """
    require(len(folders) > 0, "name the folder of at least one run")
    alone = len(folders) == 1
    target = out or (folders[0] / PLOT if alone else Path("comparison.png"))
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    histories = [read(folder / HISTORY) for folder in folders]
    drawing = figure(dict(zip(names, histories, strict=True)), x)
    kind = target.suffix.lower().lstrip(".")
    kinds = sorted(drawing.canvas.get_supported_filetypes())
    require(kind in kinds, f"{target}: the name must end in one of {', '.join(kinds)}")
    require(target.parent.is_dir(), f"{target}: there is no folder {target.parent}")
    with writing(target), whole_file(target) as file:
        drawing.savefig(file, format=kind, dpi=160)
    return target


def figure(runs: Mapping[str, list[dict]], unit: str = "tokens") -> "Figure":
    """Histories by name, as a picture: one run in detail, or a comparison of several."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for name, events in runs.items():
        require(bool(outcome(events)), f"{name}: its history holds no losses yet")
    placed = {name: along(name, events, unit) for name, events in runs.items()}
    drawing = Figure(figsize=(WIDTH, 5.2))
    FigureCanvasAgg(drawing)
    with rc_context({"text.parse_math": False}):  # a folder may be called $x_$
        if len(runs) == 1:
            (events,) = placed.values()
            draw_run(drawing, events, unit)
        else:
            draw_comparison(stacked(drawing, [4.3], top=0.4)[0], placed, unit)
    return drawing


def draw_run(drawing: "Figure", events: list[dict], unit: str) -> None:
    """Its losses, and what there is to tell under them, along one axis."""
    phases = stretches(events)
    under = panels(phases)
    losses, *others = stacked(drawing, [LOSSES, *(panel.height for panel in under)], top=1.06)
    for axes in (losses, *others):
        set_axis(axes, [phases[0].start, *(phase.end for phase in phases)], unit)
        for index, phase in enumerate(phases):
            shade = ("#F3F5F7", "white")[index % 2]
            axes.axvspan(phase.start, phase.end, color=shade, linewidth=0, zorder=0)
            if select(phase.events, "grow"):
                axes.axvline(phase.start, color=BAD, linewidth=1, linestyle=(0, (4, 2)))
    draw_losses(losses, events, phases)
    for panel, axes in zip(under, others, strict=True):
        panel.draw(axes, phases, unit)
    for axes in [losses, *others][:-1]:
        axes.set_xlabel("")
        axes.tick_params(labelbottom=False)


def stacked(drawing: "Figure", heights: Sequence[float], top: float) -> "list[Axes]":
    """Axes of these heights under each other; the picture becomes as high as they need."""
    height = top + sum(heights) + GAP * (len(heights) - 1) + BOTTOM
    drawing.set_size_inches(WIDTH, height)
    found, above = [], height - top
    for own in heights:
        above -= own
        size = (WIDTH - LEFT - RIGHT) / WIDTH, own / height
        found.append(drawing.add_axes((LEFT / WIDTH, above / height, *size)))
        found[-1].spines[["top", "right"]].set_visible(False)
        found[-1].yaxis.set_label_coords(-0.057, 0.5)
        above -= GAP
    return found


if __name__ == "__main__":
    import tyro

    positional = (tyro.conf.PositionalRequiredArgs,)
    run_command(lambda: print(tyro.cli(plot, prog="python -m utils.plot", config=positional)))
