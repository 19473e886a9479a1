"""The numbers of the history, shown by another program as well.

Another tracker is a function from the run's folder to a `Track`, its row in TRACKERS and its name
in config.Tracker. What it needs is imported in the function: only who asks for it has it.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from tqdm import tqdm

from config import Tracker
from utils.spare import Spare

Track = Callable[[dict[str, float], int], None]
"""Takes numbers by name, and the training tokens of the whole run by then."""
PLACE = {"wall_s", "phase", "step", "tokens"}


def tensorboard(out: Path) -> Track:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"), purge_step=0)  # all comes again on a resume

    def track(values: dict[str, float], tokens: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, tokens)
        writer.flush()

    return track


TRACKERS: dict[Tracker, Callable[[Path], Track]] = {"tensorboard": tensorboard}


def tracker(name: Tracker, out: Path) -> Callable[[dict], None]:
    """What wants every event of the history, those of before a resumption included."""
    if name == "none":
        return lambda event: None
    started = cache(TRACKERS[name])

    def pass_on(event: dict) -> None:
        track = started(out)
        if "tokens" in event:
            track(numbers(event), event["tokens"])

    return Spare(f"tracker = {name}", pass_on, tqdm.write)


def numbers(event: dict) -> dict[str, float]:
    """`{"event": "eval", "valid_loss": 3.1}` -> `{"eval/valid_loss": 3.1}`; lists and text are left
    to the history."""
    return {
        f"{event['event']}/{name}": value
        for name, value in event.items()
        if type(value) in (int, float) and name not in PLACE
    }
