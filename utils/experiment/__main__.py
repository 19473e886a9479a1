"""Choices at a growth, compared:  python -m utils.experiment noise tiny --seeds 2."""

import sys

from utils.experiment.runner import run_experiment
from utils.experiment.variants import parse_experiment
from utils.runtime.cli import run_command

if __name__ == "__main__":
    run_command(lambda: run_experiment(parse_experiment(sys.argv[1:])))
