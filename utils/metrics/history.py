"""The record of a run: one flat JSON object a line, `event` first, full floats, never NaN."""

import json
import os
import time
from collections.abc import Callable, Sequence
from itertools import count, takewhile
from pathlib import Path

from config import InputError, require
from utils.metrics.history_fields import ALWAYS, HISTORY_FIELDS
from utils.runtime.atomic_io import atomic_file, explain_write_errors
from utils.runtime.stopwatch import TIME_KINDS

HISTORY_FILE = "training_history.jsonl"
PLOT_FILE = "training_curves.png"
POSITION_FIELDS = {"event", "wall_s", "phase", "phase_name", "step", "tokens"}
"""Fields that say when something was measured, not what."""
EVALUATED_TEXT_SETTINGS = {"training.eval_tokens", "training.final_eval_tokens"}
"""Settings that move all windows that are evaluated: the regular ones are among the final ones."""
SETTLING_STEPS = (0, 10, 50, 200)
"""Steps after a growth at which the loss is always evaluated."""
LR_FIELDS = {"lr", "lr_min", "lr_max"}
"""The schedule's learning rate, and the lowest and the highest that a parameter has."""


class History:
    """Appends a line per event.

    A line counts once its newline is written: what a killed run left after the last newline is
    dropped.
    """

    def __init__(
        self,
        path: Path,
        now: Callable[[], float] | None = None,
        length: int | None = None,
        also: Callable[[dict], None] = lambda event: None,
    ) -> None:
        """Opens a history.

        Args:
            path: The file to append to.
            now: Seconds that the run has taken; None counts on from the last line.
            length: Bytes of the file to go on after; None goes on after all that is there.
            also: Called with each event, from the first of the file on.
        """
        if length is not None:
            os.truncate(path, length)
        earlier = read_history(path) if path.exists() else []
        start_s = time.perf_counter() - (earlier[-1]["wall_s"] if earlier else 0.0)
        self.now = now or (lambda: time.perf_counter() - start_s)
        self.path = path
        self.file = path.open("ab")
        self.file.truncate(path.read_bytes().rfind(b"\n") + 1)
        self.also = also
        for event in earlier:
            also(event)

    def __call__(self, event: str, **values: object) -> None:
        """Appends an event, whose fields HISTORY_FIELDS declares; its `wall_s` is now unless it is
        given. Raises ValueError for a value that JSON cannot hold."""
        undeclared = values.keys() - HISTORY_FIELDS[event].keys() - ALWAYS.keys()
        assert not undeclared, f"HISTORY_FIELDS[{event!r}] lacks {', '.join(sorted(undeclared))}"
        line = {"event": event, "wall_s": self.now(), **values}
        self.file.write(encode_event(line))
        self.file.flush()
        self.also(line)

    def size(self) -> int:
        """Returns the bytes written so far."""
        return self.file.tell()

    def sync(self) -> None:
        """Returns once everything written is on the disk."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self.file.close()

    def __enter__(self) -> "History":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_history(path: Path) -> list[dict]:
    """Returns the event of every line whose newline was written.

    Raises:
        InputError: for a missing file, and for a line that is no event, by its number.
    """
    require(path.is_file(), f"{path}: there is no such file")
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_decode(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def write_history(path: Path, events: list[dict]) -> None:
    """Writes events into a file, whole or not at all.

    Raises:
        InputError: if it cannot be written.
    """
    with explain_write_errors(path), atomic_file(path) as file:
        file.writelines(map(encode_event, events))


def thin_history(events: list[dict], step_every: int, drop: Sequence[str]) -> list[dict]:
    """Returns a run's history with one of `step_every` of its `step` lines (0: with none of them)
    and all other lines, without the fields `drop`. The `run` line says so, as `thinned`.

    Raises:
        InputError: for a history that does not begin with a `run` line or was thinned before.
    """
    record = run_record(events)
    require(events[:1] == [record], "the history does not begin with its run")
    require("thinned" not in record, f"the history was thinned before: {record.get('thinned')}")
    steps = f"1 of {step_every} step lines" if step_every else "no step lines"
    numbers = count(1)
    kept = [
        {name: value for name, value in event.items() if name not in drop}
        for event in events
        if event["event"] != "step" or (step_every and next(numbers) % step_every == 0)
    ]
    return [kept[0] | {"thinned": ", without ".join([steps, *drop])}, *kept[1:]]


def select_events(events: list[dict], kind: str) -> list[dict]:
    """Returns the events of a kind, such as "step"."""
    return [event for event in events if event["event"] == kind]


def phase_events(events: list[dict], phase: int) -> list[dict]:
    """Returns the events of a phase, given its number."""
    return [event for event in events if event.get("phase") == phase]


def run_record(events: list[dict]) -> dict:
    """Returns the run's first line; empty if the history does not begin with it."""
    return next(iter(select_events(events, "run")), {})


def time_spent(end: dict) -> dict[str, float]:
    """Returns the seconds of a run by kind, from the event of its end; those that it tells."""
    return {kind: end[f"{kind}_s"] for kind in TIME_KINDS if f"{kind}_s" in end}


def last_metrics(events: list[dict], phase: int) -> dict[str, float]:
    """Returns the last training metrics of a phase and its last validation losses, by name."""
    own = phase_events(events, phase)
    metrics: dict[str, float] = {}
    for event in select_events(own, "step")[-1:]:
        metrics |= {k: v for k, v in event.items() if k not in POSITION_FIELDS | LR_FIELDS}
    for event in select_events(own, "eval")[-1:]:
        names = "valid_loss", "final_valid_loss"
        metrics |= {name: event[name] for name in names if name in event}
    return metrics


def loss_above_growth(events: list[dict], phase: int) -> list[tuple[dict, float]]:
    """Returns each evaluation of a phase, and how far the validation loss was above what it had
    been before the phase's growth; nothing if the phase did not grow.

    Both losses are in float32 right after the growth; later ones are taken to be off float32's by
    as much as that one was (docs/performance.md says how far that is wrong). Evaluations on other
    text than that, which a change of EVALUATED_TEXT_SETTINGS brings, cannot be compared with it and
    are left out.
    """
    own = list(
        takewhile(
            lambda event: event.get("setting") not in EVALUATED_TEXT_SETTINGS,
            phase_events(events, phase),
        )
    )
    before = [event.get("valid_loss_fp32") for event in select_events(own, "grow")]
    evals = select_events(own, "eval")
    if not evals or not before or before[-1] is None:
        return []
    offset = evals[0]["valid_loss"] - evals[0].get("valid_loss_fp32", evals[0]["valid_loss"])
    losses = [event.get("valid_loss_fp32", event["valid_loss"] - offset) for event in evals]
    return [(event, loss - before[-1]) for event, loss in zip(evals, losses, strict=True)]


def settling_losses(events: list[dict], phase: int) -> dict[int, float]:
    """Returns by step, for those of SETTLING_STEPS that were evaluated, how far the validation loss
    was above that before the growth."""
    above = loss_above_growth(events, phase)
    return {event["step"]: loss for event, loss in above if event["step"] in SETTLING_STEPS}


def encode_event(event: dict) -> bytes:
    """Returns an event as a line. Raises ValueError for a value that JSON cannot hold."""
    body = ", ".join(f"{json.dumps(name)}: {_encode(name, event[name])}" for name in event)
    return f"{{{body}}}\n".encode()


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
