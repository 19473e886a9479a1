"""The folder that a run writes, and what it says there about where it ran."""

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
from filelock import FileLock, Timeout

from config import InputError, Run, require
from utils import resume
from utils.device import is_out_of_memory
from utils.errors import RunStopped
from utils.files import sweep_parts
from utils.history import HISTORY, read
from utils.schedule import Stage
from utils.signals import Stopped


def check_folder(run: Run, files: list[str]) -> None:
    """Raises InputError where `out` cannot be a folder, or holds what must not be lost: a run, or
    one of the `files` that this one would write."""
    out = run.out
    for path in (out, *out.absolute().parents):
        if path.exists():
            require(path.is_dir(), f"out = {out}: {path} is a file")
            require(os.access(path, os.W_OK | os.X_OK), f"out = {out}: {path} cannot be written")
            break
    there = [name for name in (HISTORY, *files) if (out / name).exists()]
    if there and not (run.overwrite or run.resume):
        state = "a finished run" if is_finished(out) else "an unfinished run"
        state = state if HISTORY in there else ", ".join(there)
        way = "--resume goes on with it, " if state == "an unfinished run" else ""
        raise InputError(
            f"out = {out} holds {state}: {way}--overwrite replaces it, --out FOLDER goes elsewhere"
        )


def is_finished(out: Path) -> bool:
    path = out / HISTORY
    return path.exists() and any(event["event"] == "end" for event in read(path)[-1:])


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Holds `out` for this process alone; the lock dies with it. Raises InputError where another
    run holds it, or where it cannot be written."""
    lock = FileLock(out / resume.FOLDER / "lock")
    try:
        (out / resume.FOLDER).mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"out = {out} is being written by another run") from None
    except OSError as error:
        raise InputError(f"out = {out} cannot be written: {error.strerror}") from None
    try:
        for folder in (out, out / resume.FOLDER):
            sweep_parts(folder)
        yield
    finally:
        lock.release()


@contextmanager
def explained(out: Path) -> Iterator[None]:
    """Adds to whatever stops a run how to go on."""
    try:
        yield
    except OSError as error:
        raise RunStopped(f"{error}; {way_on(out)}") from error
    except RunStopped as stop:
        raise RunStopped(f"{stop}; {way_on(out)}") from stop
    except Stopped as stop:
        raise Stopped(stop.number, way_on(out)) from stop


@contextmanager
def within_memory(stage: Stage, micro: int | None) -> Iterator[None]:
    """Says, where memory runs out, which setting needs less."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        size = stage.phase.batch_size
        raise RunStopped(
            f"{stage}: out of memory with {min(micro or size, size)} of its batch of {size} "
            "sequences at a time; a smaller --training.micro-batch-size needs less"
        ) from error


def way_on(out: Path) -> str:
    kept = resume.points(out)
    if not kept:
        return "nothing was kept yet: run the same command with --overwrite"
    return f"{kept[-1]} is kept: the same command with --resume goes on from there"


def check_disk(out: Path, found: list[Stage]) -> None:
    """Raises InputError unless the checkpoints to come fit, with the points for a resumption."""
    weights = sum(4 * stage.config.num_params * len(stage.files) for stage in found)
    # The two that are kept and the one that is being written: weights and both moments.
    points = (resume.KEPT + 1) * max(12 * stage.config.num_params for stage in found)
    folder = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    require(
        free > weights + points,
        f"out = {out}: the checkpoints need {(weights + points) / 1e9:.1f} GB of disk, "
        f"{free / 1e9:.1f} GB are free",
    )


def versions() -> dict[str, str | None]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "tokenizers": tokenizers.__version__,
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit that this code is at, with -dirty for changes since; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        answer = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
