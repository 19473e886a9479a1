"""A run's losses over its phases: did the transitions hurt, which phase paid, how far it got."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from utils.along import Stretch, curve, stretches
from utils.history import above_growth, header, select
from utils.units import duration, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST = 5e-4
"""Nats: what three decimals do not show is as good as before."""
GOOD, BAD, TRAIN, SMOOTH = "#0072B2", "#B84600", "#BFC5CC", "#7D858F"


def draw_losses(axes: "Axes", events: list[dict], phases: list[Stretch]) -> None:
    device = header(events).get("device", "an unknown device")
    title = f"{corpus(events)} on {device}, {spent(events)}: {outcome(events)}"
    axes.set_title(title, loc="left", pad=54, size=min(12, 900 / len(title)), weight="bold")
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(*loss_limits([events], headroom=0.22 if len(phases) > 1 else 0.05))
    axes.plot(*curve(events, "step"), color=TRAIN, linewidth=1, label="training")
    for phase in phases:
        draw_phase(axes, phase, params(events, phase.number), note_size(phases))
    axes.plot(*curve(events, "eval"), "o-", color=GOOD, markersize=4, label="validation")
    axes.legend(loc="lower left", edgecolor="none", framealpha=0.6)


def draw_phase(axes: "Axes", phase: Stretch, about: str, size: float) -> None:
    """Over the axes what the phase is and brought, at its left how it began, then how it ended."""
    bold = {"size": size + 1, "weight": "bold"}
    note = partial(axes.annotate, textcoords="offset points")
    corner = partial(note, xy=(phase.start, 1), xycoords=axes.get_xaxis_transform())
    corner(f"{phase.number} {phase.name}", xytext=(4, 8 + 2.6 * size), **bold)
    corner(about, xytext=(4, 6 + 1.3 * size), size=size)
    paid = gained(phase) < LEAST
    corner(gain(phase), xytext=(4, 6), size=size, color=GOOD if paid else BAD)
    for grow in select(phase.events, "grow"):
        corner(drift(grow), xytext=(4, -4), va="top", size=size - 0.5, color=BAD)
    axes.plot(*smooth(*curve(phase.events, "step")), color=SMOOTH, linewidth=1.5)
    trained = [event for event in phase.events if event.get("at", 0) > phase.start]
    for at, loss in list(zip(*curve(trained, "eval"), strict=True))[-1:]:
        ended = {"xy": (at, loss), "xytext": (-2, -6)}
        note(f"{loss:.2f}", **ended, ha="right", va="top", color=GOOD, **bold)


def note_size(phases: Sequence[Stretch]) -> float:
    """Of letters, in points, so that notes about so many phases stay apart."""
    return min(8.5, 52 / len(phases))


def params(events: list[dict], number: int) -> str:
    """What a token passes through, of all that the phase's model has, as far as it is known."""
    run = header(events)
    total = dict(enumerate(run.get("params", []), start=1))
    for grow in select(events, "grow"):
        total |= {grow["phase"] - 1: grow["params_before"], grow["phase"]: grow["params_after"]}
    active = dict(enumerate(run.get("active_params", []), start=1))
    known = {known[number]: None for known in (active, total) if number in known}
    return " of ".join(map(short, known)) + " params" * (len(known) == 1)


def since_growth(phase: Stretch) -> tuple[np.ndarray, np.ndarray]:
    """Places, and how far the validation loss was above that before the phase's growth."""
    above = above_growth(phase.events, phase.number)
    return np.array([event["at"] for event, _ in above]), np.array([loss for _, loss in above])


def gained(phase: Stretch) -> float:
    """What the phase, with the growth that began it, did to the validation loss."""
    above, losses = since_growth(phase)[1], curve(phase.events, "eval")[1]
    if above.size:
        return above[-1]
    return losses[-1] - losses[0] if len(losses) > 1 else 0.0


def gain(phase: Stretch) -> str:
    """The same in words, and how long it took."""
    known = len(curve(phase.events, "eval")[1]) > 1
    change = f"{signed(gained(phase))} in " if known else ""
    return change + duration(phase.seconds)


def signed(change: float, decimals: int = 2) -> str:
    return f"{change:+.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def loss_limits(runs: Sequence[list[dict]], headroom: float) -> tuple[float, float]:
    """Every loss fits but those of a run's first steps, near log(vocabulary), and of a collapse."""
    seen, usual = [], 0.0
    for events in runs:
        curves = [curve(events, kind) for kind in ("step", "eval")]
        # Of each kind: where a model overfits, the one is far above the other, and no collapse.
        usual = max(usual, *(float(np.median(losses)) for _, losses in curves if losses.size))
        at, losses = (np.concatenate(both) for both in zip(*curves, strict=True))
        seen.extend(losses[at >= min(stretches(events)[0].end / 4, at.max())])
    low, high = min(seen), min(max(seen), 3 * usual)
    span = max(high - low, 0.1)
    return low - 0.1 * span, high + headroom * span


def smooth(at: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moving average of many points, over a window that narrows towards both ends."""
    points, widest = len(losses), min(len(losses) // 16, 50)
    if widest < 2:
        return at[:0], losses[:0]
    reach = [min(i, points - 1 - i, widest) for i in range(points)]
    return at, np.array([losses[i - r : i + r + 1].mean() for i, r in enumerate(reach)])


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
    for kind, field, name in (("eval", "valid_loss", "validation"), ("step", "loss", "training")):
        for event in select(events, kind)[-1:]:
            return f"{name} loss {event[field]:.2f}"
    return ""


def drift(grow: dict) -> str:
    """The operator, and how far it moved the model on the probe batch."""
    moved = {"loss": grow["loss_drift"], "logits": grow["max_logit_diff"]}
    lines = [
        f"\N{GREEK CAPITAL LETTER DELTA}{name} {'is no number' if move is None else f'{move:.2g}'}"
        for name, move in moved.items()
    ]
    return "\n".join([grow["how"], *lines]).replace("e-0", "e-")
