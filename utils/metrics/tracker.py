"""Sends a run's numbers, growths and picture to another program as well.

Another tracker is a function that takes the run's folder and the history's first line, starts the
tracker's own run and returns a Tracker. It needs a row in TRACKERS under the name of the library
that it imports, which is the one to install with pip, and that name in config.TrackerName. Import
the library inside the function, so that only those who ask for it need it.
"""

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from config import TrackerName, require
from utils.metrics.history import POSITION_FIELDS, encode_event
from utils.runtime.best_effort import BestEffort
from utils.runtime.formatting import format_markdown_table

GROWTH_FIELDS = (
    "phase_name", "growth", "loss_before", "loss_after", "loss_drift", "max_logit_diff",
    "max_logit_diff_fp32", "flipped", "probe_tokens", "copy_distance",
)  # fmt: skip
"""Fields of `grow` events that a tracker shows as a table, with a row for each growth."""
PICTURE_GROWTH = 1.25
"""How many times as many tokens must have been trained on before the picture is sent again: a
tracker keeps every one, and these are ten while the tokens become ten times as many."""

Table = list[tuple]
"""Rows of a table, the first of them its head."""


class Tracker(NamedTuple):
    """What to call of a tracker that has been started."""

    log: Callable[[dict[str, float | Table | Path], int, int], None]
    """Takes values by name, each a number, a table or the file of a picture, the training tokens of
    the whole run by then, and the number of the history's line, from 0. A resumed run sends the
    lines before again."""
    finish: Callable[[int], None]
    """Takes the exit code: 0, or 1 for a run that was stopped."""


def start_tensorboard(out: Path, record: dict) -> Tracker:
    """Returns a tracker that writes into `out`/tensorboard."""
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"), purge_step=0)  # a resumed run sends all again
    writer.add_text("config", f"```\n{json.dumps(record['config'], indent=1)}\n```")

    def log(values: dict[str, float | Table | Path], tokens: int, line: int) -> None:
        for name, value in values.items():
            if isinstance(value, Path):
                writer.add_image(name, imread(value)[..., :3], tokens, dataformats="HWC")
            elif isinstance(value, list):
                rows = [tuple(map(str, row)) for row in value]
                writer.add_text(name, "\n".join(format_markdown_table(rows)), tokens)
            else:
                writer.add_scalar(name, value, tokens)
        writer.flush()

    return Tracker(log, lambda exit_code: writer.close())


def start_wandb(out: Path, record: dict) -> Tracker:
    """Returns a tracker that sends to Weights & Biases. The id of its run follows from the
    history's first line, so that a resumed run goes on in the same one."""
    import wandb  # pyright: ignore[reportMissingImports]

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "model-growth"),
        name=out.resolve().name,
        id=hashlib.sha256(encode_event(record)).hexdigest()[:16],
        config=record["config"],
        dir=out,
        resume="allow",
        reinit="create_new",
    )
    run.define_metric("*", step_metric="tokens")
    first_line = run.step  # of a run that is resumed, wandb has the lines before

    def log(values: dict[str, float | Table | Path], tokens: int, line: int) -> None:
        if line < first_line:
            return
        media: dict[str, object] = {"tokens": tokens}
        for name, value in values.items():
            if isinstance(value, Path):
                media[name] = wandb.Image(str(value))
            elif isinstance(value, list):
                media[name] = wandb.Table(columns=list(value[0]), data=value[1:])
        run.log(values | media, step=line)

    return Tracker(log, run.finish)


TRACKERS: dict[TrackerName, Callable[[Path, dict], Tracker]] = {
    "tensorboard": start_tensorboard,
    "wandb": start_wandb,
}


def check_tracker(name: TrackerName) -> None:
    """Raises InputError, with the command that installs it, if a tracker's library is missing."""
    spec = None if name == "none" else find_spec(name)
    # A folder of that name, such as wandb makes one, is found as a package without an origin.
    is_there = name == "none" or (spec is not None and spec.origin is not None)
    require(is_there, f"tracker = {name} needs a library: pip install {name}")


class RunTracker:
    """A run's tracker, started with the first event. If it fails, it warns once and does no
    more."""

    def __init__(self, name: TrackerName, out: Path):
        """Starts nothing yet.

        Args:
            name: The tracker; `none` sends nothing.
            out: The run's folder.
        """
        self.name: TrackerName = name
        self.out = out
        self.tracker: Tracker | None = None
        self.attempt = BestEffort(f"tracker = {name}", lambda call: call(), tqdm.write)
        self.lines = self.tokens = self.picture_tokens = 0
        self.growths: Table = [GROWTH_FIELDS]

    def send_event(self, event: dict) -> None:
        """Sends an event of the history; it gets every one, those before a resumption included."""
        if self.name != "none":
            self.attempt(partial(self._send_event, event))

    def send_picture(self, picture: Path, is_last: bool = False) -> None:
        """Sends the run's picture: the last one, and others as PICTURE_GROWTH says."""
        is_due = self.tokens >= PICTURE_GROWTH * self.picture_tokens
        if self.tracker and picture.is_file() and (is_last or is_due):
            self.picture_tokens = self.tokens
            values: dict[str, float | Table | Path] = {picture.stem: picture}
            self.attempt(partial(self.tracker.log, values, self.tokens, self.lines - 1))

    def __enter__(self) -> "RunTracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self.tracker:
            self.attempt(partial(self.tracker.finish, int(kind is not None)))

    def _send_event(self, event: dict) -> None:
        event = json.loads(encode_event(event))  # as it is read back when the run is resumed
        if self.tracker is None:
            self.tracker = TRACKERS[self.name](self.out, event)
        line, self.lines = self.lines, self.lines + 1
        self.tokens = event.get("tokens", self.tokens)
        values = tracked_values(event)
        if event["event"] == "grow":
            self.growths.append(tuple(event[name] for name in GROWTH_FIELDS))
            values["growths"] = list(self.growths)
        if values:
            self.tracker.log(values, self.tokens, line)


def tracked_values(event: dict) -> dict[str, float | Table | Path]:
    """Returns an event's measures: `{"eval/valid_loss": 3.1}` for `{"event": "eval",
    "valid_loss": 3.1}`. Lists and text are left to the history, and so are `change`, which measures
    nothing, and what has no place among the tokens."""
    if "tokens" not in event or event["event"] == "change":
        return {}
    return {
        f"{event['event']}/{name}": value
        for name, value in event.items()
        if type(value) in (int, float) and name not in POSITION_FIELDS
    }
