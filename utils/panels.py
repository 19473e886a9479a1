"""What lies under a run's losses, along the same axis: how long each growth took to pay, whether
the experts are used, how far copies have moved apart.

Each is drawn if the history tells enough for it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from utils.alive import STARVING
from utils.along import Stretch, curve, text
from utils.curves import BAD, GOOD, LEAST, note_size, signed, since_growth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

APART = {
    "twin_distance": ("twins", "#009E73", "s"),
    "expert_divergence": ("experts", "#CC79A7", "o"),
}

COLOURS = {"cmap": "PuOr", "vmin": 0, "vmax": 2}
"""Of a load: 1 is an even share."""


class Panel(NamedTuple):
    height: float
    """In inches."""
    draw: Callable[["Axes", list[Stretch], str], None]


def panels(phases: list[Stretch]) -> list[Panel]:
    """Those that the run's phases tell enough for."""
    found = []
    if any(since_growth(phase)[0].size > 1 for phase in phases):
        found.append(Panel(1.2, draw_since_growth))
    if layers := max(load.shape[1] if len(load) else 0 for _, load in map(loads, phases)):
        found.append(Panel(min(1 + 0.12 * layers, 3), draw_load))
    if any(curve(phase.events, "eval", name)[0].size for phase in phases for name in APART):
        found.append(Panel(1.2, draw_apart))
    return found


def headline(axes: "Axes", what: str) -> None:
    axes.set_title(what, loc="left", y=1, size=9, weight="bold")


def draw_since_growth(axes: "Axes", phases: list[Stretch], unit: str) -> None:
    headline(axes, "Validation loss above that before the growth, in nats")
    axes.axhline(0, color="black", linewidth=0.8)
    for phase in phases:
        at, above = since_growth(phase)
        if len(at) < 2:
            continue
        axes.plot(at, above, "o-", color="#555555", markersize=3, linewidth=1)
        for colour, chosen in ((BAD, above >= 0), (GOOD, above <= 0)):
            axes.fill_between(
                at, above, where=chosen, interpolate=True, color=colour, alpha=0.35, linewidth=0
            )
        axes.annotate(
            verdict(at, above, unit),
            (phase.start, 1),
            (4, -3),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            va="top",
            size=note_size(phases) - 0.5,
            color=GOOD if above[-1] < LEAST else BAD,
        )
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.6 * (high - low))


def verdict(at: np.ndarray, above: np.ndarray, unit: str) -> str:
    """How much worse the model got after its growth, and when it was as good as before."""
    worst = int(above.argmax())
    if above[worst] < LEAST:
        return "not worse at\nany evaluation"
    back = np.flatnonzero(above[worst:] < LEAST)
    if not back.size:
        return f"{signed(above[worst], 3)} at worst,\nnot back"
    after = text(at[worst + back[0]] - at[0], unit)
    return f"{signed(above[worst], 3)} at worst,\nback after {after}"


def loads(phase: Stretch) -> tuple[np.ndarray, np.ndarray]:
    """Places, and each expert's load there (place, layer, expert), 1 being an even share."""
    at, load = curve(phase.events, "eval", "expert_load")
    return at, load * load.shape[-1]


def draw_load(axes: "Axes", phases: list[Stretch], unit: str) -> None:
    """A row for each expert, those of a layer together."""
    axes.set_ylabel("layer")
    axes.margins(y=0)
    axes.axvspan(phases[0].start, phases[-1].end, color="#DDE1E6", linewidth=0)
    for phase in phases:
        at, load = loads(phase)
        if not len(at):
            continue
        headline(axes, f"Load of each expert: {usage(load[-1])}")
        _, layers, experts = load.shape
        between = (at[1:] + at[:-1]) / 2
        rows = np.linspace(0, layers, layers * experts + 1)
        image = load.reshape(len(at), -1).T
        axes.pcolormesh([phase.start, *between, phase.end], rows, image, **COLOURS)
        axes.hlines(range(1, layers), phase.start, phase.end, color="white", linewidth=0.8)
    axes.invert_yaxis()
    count = round(axes.get_ylim()[0])
    shown = range(0, count, 1 + count // 13)
    axes.set_yticks([layer + 0.5 for layer in shown], [f"{layer}" for layer in shown], size=7)
    draw_scale(axes)


def draw_scale(axes: "Axes") -> None:
    """What the colours of a load mean, over the axes at their right."""
    strip = axes.inset_axes((0.82, 1.045, 0.16, 0.05))
    steps = np.linspace(COLOURS["vmin"], COLOURS["vmax"], 65)
    strip.pcolormesh(steps, [0, 1], [(steps[1:] + steps[:-1]) / 2], **COLOURS)
    strip.set_xticks([0, 1, 2], ["idle", "even share", "twice"], size=7)
    strip.set_yticks([])
    strip.xaxis.tick_top()
    strip.tick_params(length=2, pad=1)


def usage(load: np.ndarray) -> str:
    """How evenly the experts are used."""
    idle = int((load < STARVING).sum())
    if idle:
        return f"{idle} of {load.size} are idle"
    return f"all used, the least {load.min():.2f} and the most {load.max():.2f} of an even share"


def draw_apart(axes: "Axes", phases: list[Stretch], unit: str) -> None:
    axes.set_ylabel("relative distance")
    ends = []
    for name, (who, colour, marker) in APART.items():
        curves = [curve(phase.events, "eval", name) for phase in phases]
        told = [one for one in curves if one[0].size]
        for index, (at, distance) in enumerate(told):
            style = {"color": colour, "marker": marker, "markersize": 3}
            axes.plot(at, distance, **style, label=who if index == 0 else None)
        ends += [f"{who} {told[-1][1][-1]:.2f}"] if told else []
    axes.set_ylim(bottom=0)
    headline(axes, f"How far copies have moved apart (0: still alike): {', '.join(ends)}")
    axes.legend(loc="upper left", edgecolor="none", framealpha=0.6, fontsize=8)
