"""The variants of an experiment side by side, from their histories, one for each seed."""

from math import isnan, nan
from statistics import mean

from utils.metrics.history import select_events, settling_losses
from utils.runtime.formatting import TableRows, format_table

Histories = dict[str, list[list[dict]]]
"""The histories of each variant, one for each seed."""


def format_report(histories: Histories) -> str:
    """Returns a row per variant, means over seeds: the validation loss at the end, how far apart
    the seeds are, how far it ended above the best variant, how its copies and experts are used, and
    its seconds; then how far the loss was above that before the growth, by steps."""
    ends = {
        name: [last_value(events, "valid_loss") for events in seeds]
        for name, seeds in histories.items()
    }
    best = min(ends.values(), key=mean)
    rows: TableRows = [
        (
            "variant",
            "valid loss",
            "seeds' spread",
            "above best",
            "copies apart",
            "experts apart",
            "underused",
            "s",
        )
    ]
    for name, seeds in histories.items():
        usage = ("copy_distance", "expert_distance", "underused_experts")
        rows.append(
            (
                name,
                f"{mean(ends[name]):.4f}",
                f"{spread(ends[name]):.4f}" if len(best) > 1 else "-",
                "best" if ends[name] is best else compare_ends(ends[name], best),
                *(mean_cell([last_value(events, key) for events in seeds]) for key in usage),
                f"{mean(events[-1]['wall_s'] for events in seeds):.0f}",
            )
        )
    note = "one seed a variant: chance alone may make such differences"
    notes = [] if len(best) > 1 else [note, ""]
    return "\n".join([*format_table(rows), "", *notes, *format_table(settling_rows(histories))])


def compare_ends(ends: list[float], best: list[float]) -> str:
    """Returns how far the losses at the end are above the best variant's, or that it is a tie.

    Pairs are of one seed, which is the same text in the same order. A difference has one sign at
    every seed and is larger than the pairs differ; all else is a tie.
    """
    pairs = [end - other for end, other in zip(ends, best, strict=True)]
    is_tie = min(pairs) <= 0 or mean(pairs) <= spread(pairs)
    return "tie" if is_tie else f"{mean(pairs):+.4f}"


def spread(values: list[float]) -> float:
    """Returns the distance of the largest value from the smallest."""
    return max(values) - min(values)


def settling_rows(histories: Histories) -> TableRows:
    """Returns how far the float32 loss was above that before the growth, means over seeds, by
    step."""
    above: dict[str, dict[int, list[float]]] = {}
    for name, seeds in histories.items():
        by_step = above.setdefault(name, {})
        for events in seeds:
            phase = select_events(events, "grow")[-1]["phase"]
            for step, loss in settling_losses(events, phase).items():
                by_step.setdefault(step, []).append(loss)
    steps = sorted({step for by_step in above.values() for step in by_step})
    header = ("above the loss before, after", *(f"{step} steps" for step in steps))
    rows = [(n, *(mean_cell(above[n][step], "+.4f") for step in steps)) for n in above]
    return [header, *rows]


def last_value(events: list[dict], name: str) -> float:
    """Returns a value of the last evaluation, NaN where it has none of that name."""
    return select_events(events, "eval")[-1].get(name, nan)


def mean_cell(values: list[float], form: str = ".3f") -> str:
    """Returns the mean as a table shows it, `-` if a value is missing."""
    return "-" if isnan(mean(values)) else f"{mean(values):{form}}"
