"""The variants of an experiment side by side, from their histories, one for each seed."""

from collections.abc import Callable
from math import isnan, nan

import numpy as np

from utils.experiment.significance import (
    CONFIDENCE,
    SEEDS_FOR_A_CLAIM,
    chance_margin,
    degrees_of_freedom,
    residual_std,
)
from utils.metrics.history import select_events, settling_losses
from utils.runtime.formatting import TableRows, format_table

Histories = dict[str, list[list[dict]]]
"""The histories of each variant, one for each seed, in the same order of seeds."""


def format_report(
    histories: Histories, format_rows: Callable[[TableRows], list[str]] = format_table
) -> str:
    """Returns the table of the variants, how to read it, and the table of how they settled.

    Args:
        histories: What the variants' runs recorded.
        format_rows: Makes lines of a table.
    """
    ends_VS = np.array(
        [
            [last_value(events, "final_valid_loss") for events in seeds]
            for seeds in histories.values()
        ]
    )
    tables = format_rows(variant_rows(histories, ends_VS)), format_rows(settling_rows(histories))
    return "\n".join([*tables[0], "", claim_note(ends_VS), "", *tables[1]])


def variant_rows(histories: Histories, ends_VS: np.ndarray) -> TableRows:
    """Returns a row per variant, means over seeds: the validation loss at the end, on
    `final_eval_tokens` tokens, how far it ended above the best variant and what that means, how its
    copies and experts are used, and its seconds."""
    means_V, margin = ends_VS.mean(1), chance_margin(ends_VS)
    best = int(means_V.argmin())
    usage = ("copy_distance", "expert_distance", "underused_experts")
    rows: TableRows = [
        (
            "variant",
            "valid loss",
            "above best",
            "verdict",
            "copies apart",
            "experts apart",
            "underused",
            "s",
        )
    ]
    for index, (name, seeds) in enumerate(histories.items()):
        above = means_V[index] - means_V[best]
        interval = "" if isnan(margin) else f" ± {margin:.4f}"
        rows.append(
            (
                name,
                f"{means_V[index]:.4f}",
                "-" if index == best else f"{above:+.4f}{interval}",
                "best" if index == best else judge(above, margin, len(seeds)),
                *(mean_cell([last_value(events, key) for events in seeds]) for key in usage),
                f"{np.mean([events[-1]['wall_s'] for events in seeds]):.0f}",
            )
        )
    return rows


def judge(above: float, margin: float, seeds: int) -> str:
    """Returns whether a variant that ended `above` the best one is worse, or that they are a tie;
    `-` where there are too few seeds to claim either."""
    if seeds < SEEDS_FOR_A_CLAIM:
        return "-"
    return "worse" if above > margin else "tie"


def claim_note(ends_VS: np.ndarray) -> str:
    """Returns what the table's intervals are and whether it claims anything, in words."""
    variants, seeds = ends_VS.shape
    if variants < 2:
        return "One variant has none to be compared with."
    count = f"{seeds} seed{'s' * (seeds > 1)}"
    claim = "A difference within ± is a tie."
    if seeds < SEEDS_FOR_A_CLAIM:
        claim = f"No claim is made: a claim takes {SEEDS_FOR_A_CLAIM} seeds."
    if seeds < 2:
        return f"{count} a variant. {claim}"
    return (
        f"{count} a variant; ± is how far apart chance alone puts any two of {variants} variants, "
        f"at {CONFIDENCE:.0%} for all pairs together (Tukey; residual standard deviation "
        f"{residual_std(ends_VS):.4f}, {degrees_of_freedom(variants, seeds)} degrees of freedom). "
        f"{claim}"
    )


def settling_rows(histories: Histories) -> TableRows:
    """Returns how far the validation loss was above that before the growth, means over seeds, by
    step; in the last row how far apart chance alone puts two variants at that step."""
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
    margins = [chance_margin(np.array([above[n][step] for n in above])) for step in steps]
    return [header, *rows, ("± by chance", *(mean_cell([margin], ".4f") for margin in margins))]


def last_value(events: list[dict], name: str) -> float:
    """Returns a value of the last evaluation, NaN where it has none of that name."""
    return select_events(events, "eval")[-1].get(name, nan)


def mean_cell(values: list[float], form: str = ".3f") -> str:
    """Returns the mean as a table shows it, `-` if a value is missing."""
    mean = float(np.mean(values))
    return "-" if isnan(mean) else f"{mean:{form}}"
