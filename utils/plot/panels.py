"""The panels under the losses of a run: how long each growth took to pay off, whether the experts
are used, and how far copies have moved apart."""

from collections.abc import Callable, Sequence
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np

from utils.metrics.diagnostics import UNDERUSED_SHARE
from utils.metrics.history import select_events
from utils.plot.axis import PhaseEvents, format_x, series
from utils.plot.losses import BLUE, GREEN, ORANGE, PINK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DISTANCES = {
    "copy_distance": ("copy to original", GREEN, "s"),
    "expert_distance": ("expert to expert", PINK, "o"),
}
"""Name, color and marker of each distance between weights that were equal at a growth."""
UNRELATED = sqrt(2)
"""Distance, relative to their size, of weights that have nothing in common."""
LEAST_MOVE = 0.05
"""Share of a distance from which on it counts as another one."""
LEAST_RISE = 5e-4
"""Nats per token from which on a loss counts as higher; three decimals do not show less."""

DrawPanel = Callable[["Sequence[Axes]", Sequence[PhaseEvents], str], None]
"""Draws into a row of axes, one for each phase, given what the horizontal axis shows."""


def choose_panels(phases: Sequence[PhaseEvents]) -> dict[DrawPanel, float]:
    """Returns the panels for which a run's history has enough, and their heights in inches."""
    panels: dict[DrawPanel, float] = {}
    if any(series(p.events, "eval", "above_growth")[0].size > 1 for p in phases):
        panels[draw_recovery] = 1.2
    loads = [load for _, load in map(relative_load, phases) if load.size]
    if loads:
        panels[draw_expert_load] = min(1 + 0.12 * loads[-1].shape[1], 3)
    if any(series(p.events, "eval", field)[0].size for p in phases for field in DISTANCES):
        panels[draw_distances] = 1.5
    return panels


def draw_recovery(row: "Sequence[Axes]", phases: Sequence[PhaseEvents], unit: str) -> None:
    """Draws how far the validation loss of each phase was above that before its growth."""
    row[0].set_ylabel("loss above that\nbefore growth\n(below 0: better)")
    for axes, phase in zip(row, phases, strict=True):
        axes.axhline(0, color="black", linewidth=0.8)
        xs, above = series(phase.events, "eval", "above_growth")
        if xs.size < 2:
            continue
        axes.plot(xs, above, "o-", color="#555555", markersize=3, linewidth=1)
        for color, where in ((ORANGE, above >= 0), (BLUE, above <= 0)):
            axes.fill_between(xs, above, where=where, interpolate=True, color=color, alpha=0.35)
        color = BLUE if above[-1] < LEAST_RISE else ORANGE
        axes.set_xlabel(describe_recovery(xs, above, unit), color=color)


def describe_recovery(xs: np.ndarray, above: np.ndarray, unit: str) -> str:
    """Returns how much worse a model got after its growth, and after how long it was as good as
    before, given how far its loss was above that before the growth."""
    worst = int(above.argmax())
    if above[worst] < LEAST_RISE:
        return "not worse at\nany evaluation"
    recovered = xs[worst:][above[worst:] < LEAST_RISE]
    outcome = "not made up so far"
    if recovered.size:
        outcome = f"made up after {format_x(recovered[0] - xs[0], unit)}"
    return f"{above[worst]:+.3f} at worst,\n{outcome}"


def relative_load(phase: PhaseEvents) -> tuple[np.ndarray, np.ndarray]:
    """Returns the places on the horizontal axis of a phase's evaluations, and the load of each
    expert there, (place, layer, expert), where 1 is an even share."""
    xs, load = series(phase.events, "eval", "expert_load")
    return xs, load * load.shape[-1]


def draw_expert_load(row: "Sequence[Axes]", phases: Sequence[PhaseEvents], unit: str) -> None:
    """Draws the load of each expert as a line of colored cells, those of a layer together."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colors, norm = "PuOr", Normalize(0, 2)
    for axes, phase in zip(row, phases, strict=True):
        axes.set_facecolor("#DDE1E6")
        xs, load = relative_load(phase)
        start, end = axes.get_xlim()
        if not xs.size:
            axes.text(0.5, 0.5, "no experts", size=8, ha="center", transform=axes.transAxes)
            continue
        edges = [start, *(xs[1:] + xs[:-1]) / 2, end]
        _, layers, experts = load.shape
        rows = np.linspace(-0.5, layers - 0.5, layers * experts + 1)
        cells = load.reshape(xs.size, -1).T
        axes.pcolormesh(edges, rows, cells, cmap=colors, norm=norm)
        axes.hlines(rows[experts:-1:experts], start, end, color="white", linewidth=0.8)
        axes.set_xlabel(describe_load(load[-1]))
    row[0].set_ylabel("load of each\nlayer's experts")
    row[0].locator_params(axis="y", integer=True)
    row[0].invert_yaxis()
    bar = row[0].figure.colorbar(ScalarMappable(norm, colors), ax=row, pad=0.01, ticks=[0, 1, 2])
    bar.ax.set_yticklabels(["none", "even\nshare", "twice\nor more"])


def describe_load(load: np.ndarray) -> str:
    """Returns how evenly the experts are used, given the load of each, where 1 is an even share."""
    underused = int((load < UNDERUSED_SHARE).sum())
    shares = f"{load.min():.2f} to\n{load.max():.2f} of an even share"
    return f"{underused} of {load.size} underused" if underused else f"all used, {shares}"


def draw_distances(row: "Sequence[Axes]", phases: Sequence[PhaseEvents], unit: str) -> None:
    """Draws how far copied units, and experts, have moved apart, and says what this means."""
    made, experts = 0.0, np.empty(0)
    for axes, phase in zip(row, phases, strict=True):
        growths = {event["growth"] for event in select_events(phase.events, "grow")}
        for field, (name, color, marker) in DISTANCES.items():
            curve = series(phase.events, "eval", field)
            axes.plot(*curve, color=color, marker=marker, markersize=3, label=name)
        copies = series(phase.events, "eval", "copy_distance")[1]
        before, experts = experts, series(phase.events, "eval", "expert_distance")[1]
        notes = []
        if copies.size:
            made = copies[0] if "Widen" in growths or not made else made
            notes.append(describe_copies(made, copies[-1]))
        if "Deepen" in growths and before.size and experts[0] > (1 + LEAST_MOVE) * before[-1]:
            notes.append("experts: jump, as those of\nnew blocks are unrelated")
        axes.set_xlabel("\n".join(notes))
    top = max(UNRELATED, row[0].get_ylim()[1])
    row[0].set_ylabel("mean distance\n(0: identical,\n1.41: unrelated)")
    row[0].set_ylim(0, 1.1 * top)
    row[0].set_yticks([0, 0.5, 1, UNRELATED], ["0", "0.5", "1", "1.41"])
    row[0].legend()


def describe_copies(made: float, now: float) -> str:
    """Returns whether copies are as far apart as the noise of their growth made them."""
    if abs(now - made) > LEAST_MOVE * made:
        return f"copies: {made:.2f} apart when\nmade, {now:.2f} at the end"
    return "copies: flat, as different\nas they were made" if made else "copies: still identical"
