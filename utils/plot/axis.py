"""The horizontal axis of a plot: the tokens a run was trained on, the FLOPs that this took, or the
time."""

from typing import NamedTuple

import numpy as np

from config import require
from utils.metrics.history import phase_events, run_record, select_events
from utils.runtime.formatting import format_number

X_LABELS = {
    "tokens": "training tokens",
    "flops": "training FLOPs",
    "hours": "time since the run began",
}
"""What the horizontal axis may show, and its label."""
TIME_UNITS = ((1.0, "h"), (1 / 60, "min"), (1 / 3600, "s"))
"""Hours in each unit of time, the largest first."""


class PhaseEvents(NamedTuple):
    """One phase of a run, as the history has it."""

    number: int
    name: str
    events: list[dict]
    seconds: float
    """Time from the end of the phase before to the last event of this one."""

    @property
    def x_range(self) -> tuple[float, float]:
        """Where on the horizontal axis the phase begins and ends."""
        xs = [event["x"] for event in self.events if "x" in event]
        return min(xs), max(xs)


def place_events(events: list[dict], unit: str) -> list[dict]:
    """Returns the events of a run, those that say their number of tokens with a further field `x`:
    their place on the horizontal axis.

    Args:
        events: The run's history.
        unit: What the axis shows: tokens, flops or hours.

    Raises:
        InputError: for another unit.
    """
    require(unit in X_LABELS, f"x = {unit!r} must be one of {', '.join(X_LABELS)}")
    timed = [event for event in events if "tokens" in event]
    xs = np.array([event["tokens"] for event in timed])
    if unit == "hours":
        xs = np.array([event["wall_s"] - events[0]["wall_s"] for event in timed]) / 3600
    elif unit == "flops":
        costs = run_record(events)["flops_per_token"]
        # The end of the run has no phase; no tokens come with it.
        costs = [costs[event.get("phase", 1) - 1] for event in timed]
        xs = np.cumsum(np.diff(xs, prepend=0) * costs)
    places = iter(xs.tolist())
    return [event | {"x": next(places)} if "tokens" in event else event for event in events]


def split_phases(events: list[dict]) -> list[PhaseEvents]:
    """Returns the phases of a run in their order."""
    phases, started_s = [], events[0]["wall_s"]
    for number in sorted({event["phase"] for event in events if "phase" in event}):
        own = phase_events(events, number)
        ended_s = own[-1]["wall_s"]
        phases.append(PhaseEvents(number, own[0]["phase_name"], own, ended_s - started_s))
        started_s = ended_s
    return phases


def series(events: list[dict], kind: str, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the places on the horizontal axis and the values of a field, from the events of a
    kind that have it."""
    chosen = [event for event in select_events(events, kind) if event.get(field) is not None]
    return np.array([e["x"] for e in chosen]), np.array([e[field] for e in chosen])


def format_x(x: float, unit: str) -> str:
    """Returns a place on the horizontal axis, or a distance along it, as people read it."""
    if unit == "tokens":
        return format_number(x)
    if unit == "flops":
        return f"{x:.3g}".replace("e+", "e")
    hours, suffix = next((each for each in TIME_UNITS if x >= each[0]), TIME_UNITS[-1])
    return f"{x / hours:.3g} {suffix}"
