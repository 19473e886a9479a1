"""Arms of an experiment side by side, from their histories: one for each seed."""

from math import isnan, nan
from statistics import mean

from utils.header import table
from utils.history import select, settled

Histories = dict[str, list[list[dict]]]
"""By arm, a history for each seed."""


def report(histories: Histories) -> str:
    """A row per arm, means over seeds: the held-out loss at the end, how far apart the seeds are,
    how far it ended above the best arm, and how far it was above what it had been before the growth
    (float32) after so many steps."""
    ends = {arm: [last(run, "valid_loss") for run in runs] for arm, runs in histories.items()}
    best = min(ends.values(), key=mean)
    rows: list[tuple[str, ...]] = [
        ("arm", "valid loss", "seeds' spread", "above best", "twins", "divergence", "dropped", "s")
    ]
    for arm, runs in histories.items():
        alive = ("twin_distance", "expert_divergence", "dropped_experts")
        rows.append(
            (
                arm,
                f"{mean(ends[arm]):.4f}",
                f"{spread(ends[arm]):.4f}" if len(ends[arm]) > 1 else "-",
                "best" if ends[arm] is best else compared(ends[arm], best),
                *(number([last(run, name) for run in runs]) for name in alive),
                f"{mean(run[-1]['wall_s'] for run in runs):.0f}",
            )
        )
    told = [] if len(best) > 1 else ["one seed an arm: chance alone may make such differences", ""]
    return "\n".join([*table(rows), "", *told, *table(settling(histories))])


def compared(ends: list[float], best: list[float]) -> str:
    """Pairs are of one seed, which is the same text in the same order. A difference has one sign
    at every seed, and is larger than the pairs differ; all else is a tie."""
    pairs = [end - other for end, other in zip(ends, best, strict=True)]
    tie = min(pairs) <= 0 or mean(pairs) <= spread(pairs)
    return "tie" if tie else f"{mean(pairs):+.4f}"


def spread(values: list[float]) -> float:
    return max(values) - min(values)


def settling(histories: Histories) -> list[tuple[str, ...]]:
    """How far the loss in float32 was above that before the growth, mean over seeds, by step."""
    above: dict[str, dict[int, list[float]]] = {}
    for arm, runs in histories.items():
        for run in runs:
            for step, loss in settled(run, select(run, "grow")[-1]["phase"]).items():
                above.setdefault(arm, {}).setdefault(step, []).append(loss)
    steps = sorted({step for of_arm in above.values() for step in of_arm})
    rows = [("above the loss before, after", *(f"{step} steps" for step in steps))]
    for arm, of_arm in above.items():
        rows.append((arm, *(number(of_arm[step], "+.4f") for step in steps)))
    return rows


def last(events: list[dict], name: str) -> float:
    """Of the last evaluation; NaN where it has no such number."""
    return select(events, "eval")[-1].get(name, nan)


def number(values: list[float], form: str = ".3f") -> str:
    return "-" if isnan(mean(values)) else f"{mean(values):{form}}"
