"""Choices at a growth, compared, and what is kept of runs.

python -m utils.experiment noise tiny --seeds 5
python -m utils.experiment report FILE [FILE ...]
python -m utils.experiment keep FOLDER FILE [--step-every 5] [--drop expert_load]
"""

import sys

import tyro

from utils.experiment.records import keep_run, print_report
from utils.experiment.runner import run_experiment
from utils.experiment.variants import parse_experiment
from utils.runtime.cli import run_command

RECORD_COMMANDS = {"report": print_report, "keep": keep_run}


def main(args: list[str]) -> None:
    """Carries out a command on what was kept, or an experiment."""
    command = RECORD_COMMANDS.get(args[0]) if args else None
    if command is None:
        run_experiment(parse_experiment(args))
        return
    prog = f"python -m utils.experiment {args[0]}"
    tyro.cli(command, args=args[1:], prog=prog, config=(tyro.conf.PositionalRequiredArgs,))


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
