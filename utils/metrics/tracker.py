"""Sends the history's numbers to another program as well.

Another tracker is a function that takes the run's folder and returns a `LogMetrics`; it needs a row
in TRACKERS and a name in config.TrackerName. Import what it uses inside the function, so that only
those who ask for it need it.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from tqdm import tqdm

from config import TrackerName
from utils.metrics.history import POSITION_FIELDS
from utils.runtime.best_effort import BestEffort

LogMetrics = Callable[[dict[str, float], int], None]
"""Takes numbers by name, and the training tokens of the whole run by then."""


def start_tensorboard(out: Path) -> LogMetrics:
    """Returns a function that writes numbers into `out`/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"), purge_step=0)  # a resumed run sends all again

    def log(values: dict[str, float], tokens: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, tokens)
        writer.flush()

    return log


TRACKERS: dict[TrackerName, Callable[[Path], LogMetrics]] = {"tensorboard": start_tensorboard}


def start_tracker(name: TrackerName, out: Path) -> Callable[[dict], None]:
    """Returns a function that takes every event of the history, those before a resumption included,
    and sends its numbers to a tracker. If the tracker fails, it warns once and does no more.

    Args:
        name: The tracker; `none` sends nothing.
        out: The run's folder.
    """
    if name == "none":
        return lambda event: None
    start = cache(TRACKERS[name])  # with the first event

    def send(event: dict) -> None:
        log = start(out)
        if "tokens" in event and event["event"] != "change":  # which measures nothing
            log(tracked_numbers(event), event["tokens"])

    return BestEffort(f"tracker = {name}", send, tqdm.write)


def tracked_numbers(event: dict) -> dict[str, float]:
    """Returns an event's measures: `{"eval/valid_loss": 3.1}` for `{"event": "eval",
    "valid_loss": 3.1}`. Lists and text are left to the history."""
    return {
        f"{event['event']}/{name}": value
        for name, value in event.items()
        if type(value) in (int, float) and name not in POSITION_FIELDS
    }
