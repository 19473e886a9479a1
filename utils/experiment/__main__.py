"""Choices at a growth, compared, and what is kept of runs.

python -m utils.experiment noise tiny --seeds 5
python -m utils.experiment report FILE [FILE ...]
python -m utils.experiment keep FOLDER FILE [--step-every 5] [--drop expert_load]
"""

import sys
from pathlib import Path

from utils.experiment.variants import parse_experiment
from utils.runtime.cli import parse_call, run_command


def report(files: tuple[Path, ...], /) -> None:
    """Prints the tables of kept histories in Markdown: of an experiment (NAME.jsonl in its folder)
    how its variants compare, of a run its phases and growths.

    Args:
        files: Files that an experiment, `keep` or train.py wrote.
    """
    from utils.experiment.records import print_report

    print_report(files)


def keep(
    folder: Path,
    file: Path,
    /,
    step_every: int = 1,
    drop: tuple[str, ...] = (),
    overwrite: bool = False,
) -> None:
    """Copies the history of a run, thinned. Its `run` line says how.

    Args:
        folder: Folder of the run (--out of train.py).
        file: File to write.
        step_every: Keep one of so many `step` lines, or none at 0. All other lines are kept.
        drop: Fields to leave out, such as expert_load.
        overwrite: Replace a file that is there. (The run's own history never is.)
    """
    from utils.experiment.records import keep_run

    keep_run(folder, file, step_every, drop, overwrite)


RECORD_COMMANDS = {"report": report, "keep": keep}


def main(args: list[str]) -> None:
    """Carries out a command on what was kept, or an experiment."""
    command = RECORD_COMMANDS.get(args[0]) if args else None
    if command is not None:
        parse_call(command, args[1:], f"python -m utils.experiment {args[0]}")()
        return
    experiment = parse_experiment(args)
    from utils.experiment.runner import run_experiment

    run_experiment(experiment)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
