"""The record of a run: one flat JSON object a line, `event` first, full floats, never NaN."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from config import InputError, require

HISTORY = "training_history.jsonl"
PLOT = "training_curves.png"


class History:
    """Appends a line per event. `wall_s` goes on from the last line of a file that already exists.

    A line counts once its newline is written: what a killed run left after the last one is dropped.
    """

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = time.perf_counter,
        length: int | None = None,
        also: Callable[[dict], None] = lambda event: None,
    ) -> None:
        """Goes on after the first `length` bytes; None: after all that is there. `also` is given
        each event, from the first of the file on."""
        if length is not None:
            os.truncate(path, length)
        earlier = read(path) if path.exists() else []
        self.clock = clock
        self.start = clock() - (earlier[-1]["wall_s"] if earlier else 0.0)
        self.path = path
        self.file = path.open("ab")
        self.file.truncate(_whole_lines(path))
        self.also = also
        for event in earlier:
            also(event)

    def __call__(self, event: str, **values: object) -> None:
        line = {"event": event, "wall_s": self.now(), **values}
        body = ", ".join(f"{json.dumps(name)}: {_encode(name, line[name])}" for name in line)
        self.file.write(f"{{{body}}}\n".encode())
        self.file.flush()
        self.also(line)

    def now(self) -> float:
        """Seconds that the run has taken so far."""
        return self.clock() - self.start

    def size(self) -> int:
        """Bytes so far."""
        return self.file.tell()

    def sync(self) -> None:
        """What was written is on the disk when this returns."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "History":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read(path: Path) -> list[dict]:
    """Every line whose newline was written. One that is no event is an InputError: it names it."""
    require(path.is_file(), f"{path}: there is no such file")
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_decode(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def select(events: list[dict], kind: str) -> list[dict]:
    return [event for event in events if event["event"] == kind]


def above_growth(events: list[dict], phase: int) -> list[tuple[dict, float]]:
    """Each evaluation of the phase, and how far the held-out loss was above what it had been before
    the phase's growth; none where there was none. Both are in float32 where the evaluation tells
    it so; else the loss is taken to be off float32's by as much as it was right after the growth.
    """
    own = [event for event in events if event.get("phase") == phase]
    before = [event.get("valid_loss_fp32") for event in select(own, "grow")]
    evals = select(own, "eval")
    if not evals or not before or before[-1] is None:
        return []
    off = evals[0]["valid_loss"] - evals[0].get("valid_loss_fp32", evals[0]["valid_loss"])
    losses = [event.get("valid_loss_fp32", event["valid_loss"] - off) for event in evals]
    return [(event, loss - before[-1]) for event, loss in zip(evals, losses, strict=True)]


def settled(events: list[dict], phase: int) -> dict[int, float]:
    """The same by step, where it was taken in float32."""
    above = above_growth(events, phase)
    return {event["step"]: loss for event, loss in above if "valid_loss_fp32" in event}


def header(events: list[dict]) -> dict:
    """What the run said of itself; empty if its record does not begin with it."""
    return next(iter(select(events, "run")), {})


def _encode(name: str, value: object) -> str:
    try:
        return json.dumps(value, allow_nan=False, default=os.fspath)
    except ValueError as error:
        raise ValueError(f"{name} = {value} cannot be recorded: {error}") from error


def _decode(line: bytes, where: str) -> dict:
    try:
        event = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is damaged: {error}") from error
    require(isinstance(event, dict) and {"event", "wall_s"} <= event.keys(), f"{where}: no event")
    return event


def _whole_lines(path: Path) -> int:
    """Bytes up to the last newline."""
    return path.read_bytes().rfind(b"\n") + 1
