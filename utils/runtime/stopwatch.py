"""Where the time of a run goes, by kind of work."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

COMMAND_STARTED_S = time.perf_counter()
"""When this module was imported: a tenth of a second after a command was called."""
TIME_KINDS = {
    "start": "imports, tokens, kernels, optimizers and CUDA graphs: what comes before steps",
    "steps": "training steps",
    "evaluation": "validation losses, those in float32 as well",
    "growth": "growing the model and checking its function on the probe, all growths together",
    "samples": "sample stories",
    "saving": "copying what is to be written into the host's memory, or writing it in place",
    "waiting": "waiting for files that were still being written beside the training",
    "reports": "the history, the tracker and the picture",
}
"""What a run spends its time on, in the order in which it is told."""


class Stopwatch:
    """Counts the seconds of a run by TIME_KINDS. At each moment one kind counts, so that all of
    them add up to the time that has passed."""

    def __init__(
        self, started_s: float | None = None, clock: Callable[[], float] = time.perf_counter
    ):
        """Begins with `start`, at `started_s` on the clock; None is now."""
        self.clock, self.kind = clock, "start"
        self.since_s = clock() if started_s is None else started_s
        self.counted = dict.fromkeys(TIME_KINDS, 0.0)

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each kind so far."""
        self.switch(self.kind)
        return dict(self.counted)

    def now(self) -> float:
        """Returns the seconds of all kinds so far."""
        return sum(self.counted.values()) + self.clock() - self.since_s

    def add(self, earlier: Mapping[str, float]) -> None:
        """Adds the seconds of a run that is resumed."""
        for kind, seconds in earlier.items():
            self.counted[kind] += seconds

    def switch(self, kind: str) -> str:
        """Counts for another kind from now on. Returns the one before."""
        now, before = self.clock(), self.kind
        self.counted[before] += now - self.since_s
        self.kind, self.since_s = kind, now
        return before

    @contextmanager
    def counting(self, kind: str) -> Iterator[None]:
        """Counts for a kind within, and then again for the one before."""
        before = self.switch(kind)
        try:
            yield
        finally:
            self.switch(before)
