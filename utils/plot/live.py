"""The picture of a run while it goes on."""

import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from utils.metrics.history import PLOT_FILE
from utils.plot.figure import plot
from utils.runtime.best_effort import BestEffort

MAX_TIME_SHARE = 0.02
"""Largest fraction of a run's time to spend on drawing."""
FIRST_DRAWING_S = 3.0
"""Seconds that the first drawing is expected to take, with the import of matplotlib."""


class LivePlot:
    """Draws a run's picture again and again, as often as MAX_TIME_SHARE of its time allows."""

    def __init__(
        self,
        out: Path,
        show: Callable[[Path], None] = lambda picture: None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Begins to count the run's time.

        Args:
            out: The run's folder, which holds its history and gets the picture.
            show: Called with each picture that has been drawn.
            clock: Seconds from any origin.
        """
        self.draw = BestEffort(f"drawing {out / PLOT_FILE}", lambda: show(plot([out])), tqdm.write)
        self.clock, self.started_s = clock, clock()
        self.drawing_s, self.last_drawing_s = 0.0, FIRST_DRAWING_S

    def update(self) -> None:
        """Draws, unless a drawing as long as the last would go beyond MAX_TIME_SHARE. A drawing
        that fails warns once, and is the last one."""
        began_s = self.clock()
        if self.drawing_s + self.last_drawing_s > MAX_TIME_SHARE * (began_s - self.started_s):
            return
        self.draw()
        self.last_drawing_s = self.clock() - began_s
        self.drawing_s += self.last_drawing_s
