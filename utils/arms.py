"""Arms of an experiment side by side, from their histories: one for each seed."""

from math import isnan, nan
from statistics import mean

from utils.header import table
from utils.history import select, settled

Histories = dict[str, list[list[dict]]]
"""By arm, a history for each seed."""


def report(histories: Histories) -> str:
    """A row per arm, means over seeds: the held-out loss at the end, how far apart the seeds are,
    and how far it was above what it had been before the growth (float32) after so many steps."""
    ends = {arm: [last(run, "valid_loss") for run in runs] for arm, runs in histories.items()}
    spreads = {arm: max(each) - min(each) for arm, each in ends.items() if len(each) > 1}
    spread = max(spreads.values(), default=0.0)
    best = min(mean(each) for each in ends.values())
    rows: list[tuple[str, ...]] = [
        ("arm", "valid loss", "seeds' spread", "above best", "twins", "divergence", "dropped", "s")
    ]
    for arm, runs in histories.items():
        above = mean(ends[arm]) - best
        alive = ("twin_distance", "expert_divergence", "dropped_experts")
        rows.append(
            (
                arm,
                f"{mean(ends[arm]):.4f}",
                f"{spreads[arm]:.4f}" if arm in spreads else "-",
                "best" if above == 0 else "tie" if above <= spread else f"{above:+.4f}",
                *(number([last(run, name) for run in runs]) for name in alive),
                f"{mean(run[-1]['wall_s'] for run in runs):.0f}",
            )
        )
    told = [] if spreads else ["one seed an arm: chance alone may make such differences", ""]
    return "\n".join([*table(rows), "", *told, *table(settling(histories))])


def settling(histories: Histories) -> list[tuple[str, ...]]:
    """How far the loss in float32 was above that before the growth, mean over seeds, by step."""
    above: dict[str, dict[int, list[float]]] = {}
    for arm, runs in histories.items():
        for run in runs:
            for step, loss in settled(run, select(run, "grow")[-1]).items():
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
