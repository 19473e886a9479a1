"""The curves of a run while it goes on."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tqdm import tqdm

from utils.history import PLOT
from utils.plot import plot
from utils.spare import Spare

SHARE = 0.02
"""Of a run's time, for drawing at most."""
FIRST_S = 1.0
"""What the first drawing is taken to cost, the import of matplotlib included."""


class Sketch:
    """Draws the curves anew when it is asked to, unless that would take more than its SHARE."""

    def __init__(self, out: Path, clock: Callable[[], float] = time.perf_counter):
        self.draw = Spare(f"drawing {out / PLOT}", partial(plot, [out]), tqdm.write)
        self.clock, self.start = clock, clock()
        self.spent, self.last = 0.0, FIRST_S

    def update(self) -> None:
        began = self.clock()
        if self.spent + self.last > SHARE * (began - self.start):
            return
        self.draw()
        self.last = self.clock() - began
        self.spent += self.last
