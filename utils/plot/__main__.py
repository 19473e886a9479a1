"""Draws the curves of one run, or of several on the same axes.

python -m utils.plot FOLDER [FOLDER ...] [--x tokens|flops|hours] [--out FILE]
"""

import sys
from pathlib import Path
from typing import Literal

from utils.runtime.cli import parse_call, run_command


def main(
    folders: tuple[Path, ...],
    /,
    out: Path | None = None,
    x: Literal["tokens", "flops", "hours"] = "tokens",
) -> None:
    """Draws the curves of one run, or of several on the same axes, from the folders they wrote.
    The picture is written whole or not at all.

    Args:
        folders: Folders of runs (--out of train.py).
        out: File for the picture; its suffix chooses the format (.png, .pdf, .svg, ...). None
            writes FOLDER/training_curves.png for one run and comparison.png for several.
        x: What the horizontal axis shows.
    """
    from utils.plot.figure import plot

    print(plot(folders, out, x))


if __name__ == "__main__":
    run_command(lambda: parse_call(main, sys.argv[1:], "python -m utils.plot")())
