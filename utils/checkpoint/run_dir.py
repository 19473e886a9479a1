"""The folder that a run writes: whether it may be written, by which process, how to go on there,
and the versions of the code that writes it."""

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import tokenizers
import torch
from filelock import Timeout
from tqdm import tqdm

from config import InputError, Run, require
from utils.checkpoint.resume import KEPT_POINTS, RESUME_FOLDER, resume_points
from utils.metrics.history import HISTORY_FILE, read_history, run_record, select_events
from utils.runtime.atomic_io import remove_partial_files
from utils.runtime.errors import NotFinite, RunStopped
from utils.runtime.file_lock import acquire_lock
from utils.runtime.signals import Stopped
from utils.schedule.phases import ResolvedPhase


def check_run_dir(run: Run, files: list[str]) -> None:
    """Raises InputError where `out` cannot be a folder, or holds what must not be lost: a run, or
    one of the `files` that this run would write."""
    out = run.out
    folder = existing_ancestor(out)
    require(folder.is_dir(), f"out = {out}: {folder} is a file")
    require(os.access(folder, os.W_OK | os.X_OK), f"out = {out}: {folder} cannot be written")
    present = [name for name in (HISTORY_FILE, *files) if (out / name).exists()]
    if present and not (run.overwrite or run.resume):
        kind = "a finished run" if is_finished(out) else "an unfinished run"
        kind = kind if HISTORY_FILE in present else ", ".join(present)
        resume = "--resume goes on with it, " if kind == "an unfinished run" else ""
        further = f", {how_to_train_further(out)}" if kind == "a finished run" else ""
        raise InputError(
            f"out = {out} holds {kind}: {resume}--overwrite replaces it, "
            f"--out FOLDER goes elsewhere{further}"
        )


def is_finished(out: Path) -> bool:
    """Whether the folder holds a run that has ended."""
    path = out / HISTORY_FILE
    return path.exists() and any(event["event"] == "end" for event in read_history(path)[-1:])


@contextmanager
def lock_run_dir(out: Path) -> Iterator[None]:
    """Holds `out` for this process alone; the lock dies with the process.

    Raises:
        InputError: if another run holds the folder, or it cannot be written.
    """
    folder = out / RESUME_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = acquire_lock(folder / "lock", tqdm.write)
    except Timeout as held:
        raise InputError(f"out = {out} is being written by another run ({held})") from None
    except OSError as error:
        raise InputError(f"out = {out} cannot be written: {error.strerror}") from None
    try:
        remove_partial_files(out)
        remove_partial_files(folder)
        yield
    finally:
        lock.release()


@contextmanager
def explain_how_to_resume(out: Path) -> Iterator[None]:
    """Raises what stops a run again, with how to go on: RunStopped also for an OSError, and Stopped
    for a signal."""
    try:
        yield
    except OSError as error:
        raise RunStopped(f"{error}; {how_to_resume(out)}") from error
    except RunStopped as stop:
        advice = [str(stop), how_to_resume(out)]
        if isinstance(stop, NotFinite) and (earlier := resume_points(out)[:-1]):
            advice.append(f"if it stops again, delete that file to go on from {earlier[-1]}")
        raise RunStopped("; ".join(advice)) from stop
    except Stopped as stop:
        raise Stopped(stop.number, how_to_resume(out)) from stop


def how_to_resume(out: Path) -> str:
    """Returns one phrase that says how to go on with the run in `out`."""
    points = resume_points(out)
    if not points:
        return "nothing was kept yet: run the same command with --overwrite"
    return f"{points[-1]} is kept: the same command with --resume goes on from there"


def how_to_train_further(out: Path) -> str:
    """Returns one phrase that says how to train the model of the finished run in `out` further."""
    events = read_history(out / HISTORY_FILE)
    *_, last = select_events(events, "checkpoint")
    config, default = run_record(events)["config"], Run()
    context, source = config["model"]["seq_len"], config["data"]["source"]
    command = f"train.py single --init-from {out / last['path']} --out NEW_FOLDER"
    command += f" --model.seq-len {context}" if context != default.model.seq_len else ""
    command += f" --data.source {source}" if source != default.data.source else ""
    return f"{command} trains its model further"


def existing_ancestor(path: Path) -> Path:
    """Returns a path, or the nearest of the folders above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def check_disk(out: Path, phases: list[ResolvedPhase]) -> None:
    """Raises InputError unless the checkpoints to come fit, with the points to resume from."""
    weights = sum(4 * phase.config.num_params * len(phase.checkpoint_files) for phase in phases)
    # The points that are kept and the one that is being written: weights and both moments.
    points = (KEPT_POINTS + 1) * max(12 * phase.config.num_params for phase in phases)
    free = shutil.disk_usage(existing_ancestor(out)).free
    require(
        free > weights + points,
        f"out = {out}: the checkpoints need {(weights + points) / 1e9:.1f} GB of disk, "
        f"{free / 1e9:.1f} GB are free",
    )


def software_versions() -> dict[str, str | None]:
    """Returns the versions that a run's results depend on, by the names in its history."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "tokenizers": tokenizers.__version__,
        "commit": code_commit(),
    }


def code_commit() -> str | None:
    """Returns the commit that this code is at, with -dirty for changes since; None outside a
    repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        answer = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
