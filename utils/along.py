"""What a run is drawn along: the tokens it was trained on, the work that took, or the time."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from config import require
from utils.history import header, select
from utils.units import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {
    "tokens": "training tokens",
    "flops": "training FLOPs",
    "hours": "time that the run took",
}
CLOCK = ((1.0, "h"), (1 / 60, "min"), (1 / 3600, "s"))
"""Hours in each unit that a time is told in."""
NARROWEST = 0.165
"""Share of the axis that a phase gets however short it is, before all are scaled to fit."""
SLIVER = 1e-6
"""Share of the run that a phase without a step is taken to be long."""


class Stretch(NamedTuple):
    """One phase as it was run, and where on the axis it lies."""

    number: int
    name: str
    start: float
    end: float
    seconds: float
    events: list[dict]


def along(name: str, events: list[dict], unit: str) -> list[dict]:
    """The events of the run called `name`; those that tell their tokens also say where they are
    drawn, `at`."""
    require(unit in LABELS, f"x = {unit!r} must be one of {', '.join(LABELS)}")
    timed = [event for event in events if "tokens" in event]
    at = np.array([event["tokens"] for event in timed])
    if unit == "hours":
        at = (np.array([event["wall_s"] for event in timed]) - events[0]["wall_s"]) / 3600
    elif unit == "flops" and timed:
        edges, work = flops(name, along(name, events, "tokens"))
        at = np.interp(at, edges, work)
    places = iter(at.tolist())
    return [event | {"at": next(places)} if "tokens" in event else event for event in events]


def flops(name: str, events: list[dict]) -> tuple[list[float], list[float]]:
    """The tokens before the first phase and after each, and the work that these took."""
    phases, rates = stretches(events), header(events).get("flops_per_token", [])
    require(
        len(rates) >= max((phase.number for phase in phases), default=0),
        f"x = flops: the history of {name} holds no flops_per_token, an older version wrote it; "
        "tokens and hours are there",
    )
    tokens = [0.0, *(phase.end for phase in phases)]
    used = [rates[phase.number - 1] for phase in phases]
    return tokens, [0.0, *np.cumsum(np.diff(tokens) * used).tolist()]


def stretches(events: list[dict]) -> list[Stretch]:
    """The phases in order, each from where the one before ended."""
    least = SLIVER * max((event["at"] for event in events if "at" in event), default=0) or 1
    phases, start, since = [], 0.0, events[0]["wall_s"]
    for number in sorted({event["phase"] for event in events if "phase" in event}):
        own = [event for event in events if event.get("phase") == number]
        end = max([start + least, *(event["at"] for event in own if "at" in event)])
        seconds = own[-1]["wall_s"] - since
        phases.append(Stretch(number, own[0]["phase_name"], start, end, seconds, own))
        start, since = end, own[-1]["wall_s"]
    return phases


def curve(events: list[dict], kind: str, name: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Places and values of what events of a kind tell by a name, where they do: by itself the loss
    of training at each "step", on held-out text at each "eval"."""
    name = name or {"step": "loss", "eval": "valid_loss"}[kind]
    chosen = [event for event in select(events, kind) if event.get(name) is not None]
    return np.array([e["at"] for e in chosen]), np.array([e[name] for e in chosen])


def text(at: float, unit: str) -> str:
    """A place on the axis, as people read it."""
    if unit == "tokens":
        return short(at)
    if unit == "flops":
        return f"{at:.3g}".replace("e+", "e")
    size, name = next((one for one in CLOCK if at >= one[0]), CLOCK[-1])
    return f"{at / size:.3g} {name}"


def set_axis(axes: "Axes", edges: Sequence[float], unit: str) -> None:
    """Linear within each phase; short phases are drawn wider, and the label says so.

    Outside the edges the axis goes on at the pace of its first and last phase.
    """
    spans = np.diff(edges)
    shares = np.maximum(spans / spans.sum(), min(NARROWEST, 1 / len(spans)))
    widths = np.pad(shares / shares.sum(), 1, mode="edge")
    places = np.concatenate([[0], widths.cumsum()]) - widths[0]
    marks = np.concatenate([[edges[0] - spans[0]], edges, [edges[-1] + spans[-1]]])
    to_places = partial(np.interp, xp=marks, fp=places)
    to_marks = partial(np.interp, xp=places, fp=marks)
    axes.set_xscale("function", functions=(to_places, to_marks))
    axes.set_xlim(*to_marks([-0.006, 1.012]))
    if len(spans) > 1:
        axes.set_xticks(edges)
    axes.xaxis.set_major_formatter(lambda at, _: text(at, unit))
    wider = " (short phases drawn wider)" if shares.sum() > 1.001 else ""
    axes.set_xlabel(LABELS[unit] + wider)
