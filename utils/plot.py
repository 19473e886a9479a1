"""Curves of one run, or of several on the same axes.

    python -m utils.plot FOLDER [FOLDER ...] [--out FILE]

One run answers: did the transitions hurt, which phase paid, how far did it get. Several runs answer
which one got furthest with the same tokens.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from config import require
from utils.cli import run_command
from utils.files import whole_file
from utils.history import HISTORY, PLOT, Stretch, curve, header, read, select, stretches
from utils.units import duration, short

if TYPE_CHECKING:  # matplotlib is slow to import: a run pays for it when it draws, not at its start
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VALID, TRAIN, SMOOTH, GROWTH = "#0072B2", "#BFC5CC", "#7D858F", "#B84600"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette, which stays apart for colour-blind eyes."""
NARROWEST = 0.15
"""Share of the axis that a phase gets however short it is, before all are scaled to fit."""


def plot(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Draws the curves of one run, or of several on the same axes, from the folders they wrote.

    The picture goes to FOLDER/training_curves.png, of several runs to comparison.png, or to --out.
    It is there whole or stays as it was.
    """
    require(len(folders) > 0, "name the folder of at least one run")
    alone = len(folders) == 1
    target = out or (folders[0] / PLOT if alone else Path("comparison.png"))
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    histories = [read(folder / HISTORY) for folder in folders]
    drawing = figure(dict(zip(names, histories, strict=True)))
    kind = target.suffix.lower().lstrip(".")
    kinds = sorted(drawing.canvas.get_supported_filetypes())
    require(kind in kinds, f"{target}: the name must end in one of {', '.join(kinds)}")
    require(target.parent.is_dir(), f"{target}: there is no folder {target.parent}")
    with whole_file(target) as file:
        drawing.savefig(file, format=kind, dpi=160)
    return target


def figure(runs: Mapping[str, list[dict]]) -> "Figure":
    """Histories by name, as a picture: one run in detail, or a comparison of several."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for name, events in runs.items():
        require(bool(outcome(events)), f"{name}: its history holds no losses yet")
    alone = len(runs) == 1
    drawing = Figure(figsize=(9, 5.2))
    FigureCanvasAgg(drawing)
    with rc_context({"text.parse_math": False}):  # a folder may be called $x_$
        axes = drawing.add_axes((0.065, 0.095, 0.91, 0.7 if alone else 0.83))
        axes.set_xlabel("training tokens")
        axes.set_ylabel("loss (nats per token)")
        axes.spines[["top", "right"]].set_visible(False)
        if alone:
            draw_run(axes, *runs.values())
        else:
            draw_comparison(axes, runs)
        axes.legend(loc="lower left" if alone else "upper right", edgecolor="none", framealpha=0.6)
    return drawing


def draw_run(axes: "Axes", events: list[dict]) -> None:
    phases = stretches(events)
    device = header(events).get("device", "an unknown device")
    title = f"{corpus(events)} on {device}, {spent(events)}: {outcome(events)}"
    axes.set_title(title, loc="left", pad=54, size=min(12, 900 / len(title)), weight="bold")
    set_token_axis(axes, [phases[0].start, *(phase.end for phase in phases)])
    axes.set_ylim(*loss_limits([events], headroom=0.22 if len(phases) > 1 else 0.05))
    axes.plot(*curve(events, "step"), color=TRAIN, linewidth=1, label="training")
    for index, phase in enumerate(phases):
        shade = ("#F3F5F7", "white")[index % 2]
        axes.axvspan(phase.start, phase.end, color=shade, linewidth=0, zorder=0)
        about = params(events, phase.number)
        draw_phase(axes, phase, about, size=min(8.5, 52 / len(phases)))
    axes.plot(*curve(events, "eval"), "o-", color=VALID, markersize=4, label="validation")


def draw_phase(axes: "Axes", phase: Stretch, about: str, size: float) -> None:
    """Over the axes what the phase is and brought, at its left how it began, then how it ended."""
    bold = {"size": size + 1, "weight": "bold"}
    note = partial(axes.annotate, textcoords="offset points")
    corner = partial(note, xy=(phase.start, 1), xycoords=axes.get_xaxis_transform())
    corner(f"{phase.number} {phase.name}", xytext=(4, 8 + 2.6 * size), **bold)
    corner(about, xytext=(4, 6 + 1.3 * size), size=size)
    corner(gain(phase), xytext=(4, 6), size=size, color=VALID)
    for grow in select(phase.events, "grow"):
        axes.axvline(phase.start, color=GROWTH, linewidth=1, linestyle=(0, (4, 2)))
        corner(drift(grow), xytext=(4, -4), va="top", size=size - 0.5, color=GROWTH)
    axes.plot(*smooth(*curve(phase.events, "step")), color=SMOOTH, linewidth=1.5)
    trained = [event for event in phase.events if event.get("tokens", 0) > phase.start]
    for last in select(trained, "eval")[-1:]:
        ended = {"xy": (last["tokens"], last["valid_loss"]), "xytext": (-2, -6)}
        note(f"{last['valid_loss']:.2f}", **ended, ha="right", va="top", color=VALID, **bold)


def draw_comparison(axes: "Axes", runs: Mapping[str, list[dict]]) -> None:
    axes.set_title(f"Validation loss of {len(runs)} runs", loc="left", size=12, weight="bold")
    axes.xaxis.set_major_formatter(lambda tokens, _: short(tokens))
    axes.set_ylim(*loss_limits(list(runs.values()), headroom=0.05))
    axes.margins(x=0.012)
    for index, (name, events) in enumerate(runs.items()):
        label = f"{name}: {outcome(events)} in {spent(events)} on {corpus(events)}"
        label = label.lstrip("_")  # matplotlib would leave it out of the legend
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(*curve(events, "step"), color=colour, alpha=0.2, linewidth=1)
        valid = curve(events, "eval")
        axes.plot(*valid, color=colour, linewidth=2, label=label)
        grown = [event["tokens"] for event in select(events, "grow")]
        height = np.interp(grown, *(valid if len(valid[0]) else curve(events, "step")))
        axes.plot(grown, height, "D", color=colour, markeredgecolor="white", markersize=8)
    axes.plot([], [], "D", color="black", label="grown here")


def set_token_axis(axes: "Axes", edges: Sequence[int]) -> None:
    """Linear in tokens within each phase; short phases are drawn wider, and the label says so.

    Outside the edges the axis goes on at the pace of its first and last phase.
    """
    spans = np.diff(edges)
    shares = np.maximum(spans / spans.sum(), min(NARROWEST, 1 / len(spans)))
    widths = np.pad(shares / shares.sum(), 1, mode="edge")
    places = np.concatenate([[0], widths.cumsum()]) - widths[0]
    tokens = np.concatenate([[edges[0] - spans[0]], edges, [edges[-1] + spans[-1]]])
    to_places = partial(np.interp, xp=tokens, fp=places)
    to_tokens = partial(np.interp, xp=places, fp=tokens)
    axes.set_xscale("function", functions=(to_places, to_tokens))
    axes.set_xlim(*to_tokens([-0.006, 1.012]))
    if len(spans) > 1:
        axes.set_xticks(edges)
    axes.xaxis.set_major_formatter(lambda tokens, _: short(tokens))
    if shares.sum() > 1.001:
        axes.set_xlabel("training tokens (short phases drawn wider)")


def params(events: list[dict], number: int) -> str:
    """What a token passes through, of all that the phase's model has, as far as it is known."""
    run = header(events)
    total = dict(enumerate(run.get("params", []), start=1))
    for grow in select(events, "grow"):
        total |= {grow["phase"] - 1: grow["params_before"], grow["phase"]: grow["params_after"]}
    active = dict(enumerate(run.get("active_params", []), start=1))
    known = {known[number]: None for known in (active, total) if number in known}
    return " of ".join(map(short, known)) + " params" * (len(known) == 1)


def gain(phase: Stretch) -> str:
    """What the phase did to the validation loss, and how long it took."""
    losses = curve(phase.events, "eval")[1]
    change = f"{losses[-1] - losses[0]:+.2f} in " if len(losses) > 1 else ""
    return change.replace("-", "\N{MINUS SIGN}") + duration(phase.seconds)


def loss_limits(runs: Sequence[list[dict]], headroom: float) -> tuple[float, float]:
    """Every loss fits but those of a run's first steps, near log(vocabulary), and of a collapse."""
    seen = []
    for events in runs:
        curves = [curve(events, kind) for kind in ("step", "eval")]
        tokens, losses = (np.concatenate(both) for both in zip(*curves, strict=True))
        seen.extend(losses[tokens >= min(stretches(events)[0].end / 10, tokens.max())])
    low, high = min(seen), min(max(seen), 3 * float(np.median(seen)))
    span = max(high - low, 0.1)
    return low - 0.1 * span, high + headroom * span


def smooth(tokens: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moving average of many points, over a window that narrows towards both ends."""
    points, widest = len(losses), min(len(losses) // 16, 50)
    if widest < 2:
        return tokens[:0], losses[:0]
    reach = [min(i, points - 1 - i, widest) for i in range(points)]
    return tokens, np.array([losses[i - r : i + r + 1].mean() for i, r in enumerate(reach)])


def corpus(events: list[dict]) -> str:
    run = header(events)
    if run.get("fallback"):
        return "BUILT-IN STORIES (hub not reachable)"
    return str(run.get("corpus", "unknown text")).replace("builtin", "built-in stories")


def spent(events: list[dict]) -> str:
    so_far = "" if select(events, "end") else " so far"
    return duration(events[-1]["wall_s"] - events[0]["wall_s"]) + so_far


def outcome(events: list[dict]) -> str:
    """The last loss; empty if there is none."""
    for kind, name in (("eval", "validation"), ("step", "training")):
        for loss in curve(events, kind)[1][-1:]:
            return f"{name} loss {loss:.2f}"
    return ""


def drift(grow: dict) -> str:
    """The operator, and how far it moved the model on the probe batch."""
    moved = {"loss": grow["loss_drift"], "logits": grow["max_logit_diff"]}
    lines = [
        f"\N{GREEK CAPITAL LETTER DELTA}{name} {'is no number' if move is None else f'{move:.2g}'}"
        for name, move in moved.items()
    ]
    return "\n".join([grow["how"], *lines]).replace("e-0", "e-")


if __name__ == "__main__":
    import tyro

    run_command(lambda: print(tyro.cli(plot, config=(tyro.conf.PositionalRequiredArgs,))))
