"""What is kept of runs: thinned histories in one file, and the tables made of them."""

from itertools import pairwise
from pathlib import Path

from config import require
from utils.experiment.report import Histories, format_report
from utils.metrics.console import run_report
from utils.metrics.history import (
    HISTORY_FILE,
    POSITION_FIELDS,
    read_history,
    run_record,
    thin_history,
    write_history,
)
from utils.runtime.formatting import format_markdown_table

LONG_FIELDS = ("expert_load",)
"""Lists that fill most of a history and that no table shows."""


def keep_experiment(path: Path, name: str, histories: Histories) -> None:
    """Writes the histories of an experiment into one file, one after another, without `step` lines
    and LONG_FIELDS. Their `run` lines say so, and name the experiment and the variant."""
    events = []
    for variant, seeds in histories.items():
        for run, *others in (thin_history(events, 0, LONG_FIELDS) for events in seeds):
            events += [run | {"experiment": name, "variant": variant}, *others]
    write_history(path, events)


def keep_run(
    folder: Path,
    file: Path,
    step_every: int = 1,
    drop: tuple[str, ...] = (),
    overwrite: bool = False,
) -> None:
    """Copies the history of a run, thinned. Its `run` line says how.

    Raises:
        InputError: for a history that is missing or was thinned before, for a field that it does
            not have or that says where an event belongs, and for a file that is there or cannot be
            written.
    """
    require(step_every >= 0, f"step_every = {step_every} must be at least 0")
    is_own = file.resolve() == (folder / HISTORY_FILE).resolve()
    require(not is_own, f"file = {file} is the history itself, of which nothing else is left")
    require(overwrite or not file.exists(), f"file = {file} is there: --overwrite replaces it")
    events = read_history(folder / HISTORY_FILE)
    optional = {name for event in events for name in event} - POSITION_FIELDS
    unknown = [name for name in drop if name not in optional]
    require(not unknown, f"drop = {', '.join(unknown)} is no field that can be left out")
    write_history(file, thin_history(events, step_every, drop))


def print_report(files: tuple[Path, ...]) -> None:
    """Prints the tables of kept histories in Markdown: of an experiment (NAME.jsonl in its folder)
    how its variants compare, of a run its phases and growths.

    Raises:
        InputError: for a file that is none of these.
    """
    require(len(files) > 0, "name at least one file of kept histories")
    print("\n\n".join(report_of(file) for file in files))


def report_of(file: Path) -> str:
    """Returns the tables of a file of kept histories, in Markdown. See `print_report`."""
    runs = split_runs(read_history(file))
    require(bool(runs), f"{file} holds no run")
    if "variant" not in run_record(runs[0]):
        require(len(runs) == 1, f"{file} holds {len(runs)} runs of no experiment")
        return run_report(runs[0])
    histories: Histories = {}
    for events in runs:
        histories.setdefault(run_record(events)["variant"], []).append(events)
    seeds = {
        name: [run_record(events)["seed"] for events in seeded]
        for name, seeded in histories.items()
    }
    different = {tuple(each) for each in seeds.values()}
    require(len(different) == 1, f"{file}: the variants differ in their seeds ({seeds})")
    return format_report(histories, format_markdown_table)


def split_runs(events: list[dict]) -> list[list[dict]]:
    """Returns the events of each of several runs that were written one after another."""
    starts = [index for index, event in enumerate(events) if event["event"] == "run"]
    return [events[start:end] for start, end in pairwise([*starts, len(events)])]
