"""Draws the curves of one run, or of several on the same axes.

python -m utils.plot FOLDER [FOLDER ...] [--x tokens|flops|hours] [--out FILE]
"""

import tyro

from utils.plot.figure import plot
from utils.runtime.cli import run_command

if __name__ == "__main__":
    positional = (tyro.conf.PositionalRequiredArgs,)
    run_command(lambda: print(tyro.cli(plot, prog="python -m utils.plot", config=positional)))
