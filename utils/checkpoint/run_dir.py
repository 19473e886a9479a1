"""The folder that a run writes: whether it may be written, by which process, how to go on there,
and the versions of the code that writes it."""

import json
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from typing import Any

import numpy
import tokenizers
import torch
from filelock import Timeout
from tqdm import tqdm

from config import SCHEDULE_FIELDS, InputError, Run, require, single
from utils.checkpoint.resume import (
    ADJUSTABLE,
    KEPT_POINTS,
    RESUME_FOLDER,
    SettingChange,
    flatten_settings,
    resume_points,
)
from utils.metrics.history import HISTORY_FILE, read_history, run_record, select_events
from utils.runtime.atomic_io import remove_partial_files
from utils.runtime.errors import NotFinite, RunStopped
from utils.runtime.file_lock import acquire_lock
from utils.runtime.formatting import format_gb, list_some
from utils.runtime.signals import Stopped
from utils.schedule.memory import CHECKPOINT_BYTES_PER_PARAM, POINT_BYTES_PER_PARAM
from utils.schedule.phases import ResolvedPhase

PASSED_ON = ("data.", "device", "model.seq_len", "precision", "tracker", "training.")
HUB_FIELDS = ("data.config", "data.split", "data.valid_split")
NOT_PASSED_ON = (
    "data.tokenizer", "data.eos_token", *(f"training.{field}" for field in SCHEDULE_FIELDS),
)  # fmt: skip
"""Settings that who trains a finished run's model further should keep, by the start of their names,
and those among them that come with the model or that a schedule of its own has no use for."""
LAST_PHASE = "training.{}_phase4"
"""Settings of the default schedule's last phase."""


def check_run_dir(run: Run, phases: list[ResolvedPhase]) -> None:
    """Raises InputError where `out` cannot be a folder, where it holds what must not be lost, a run
    or a checkpoint that one of the `phases` would write, and where it holds no run to resume."""
    out, folder = run.out, existing_ancestor(run.out)
    files = [name for phase in phases for name in phase.checkpoint_files]
    require(folder.is_dir(), f"out = {out}: {folder} is a file")
    require(os.access(folder, os.W_OK | os.X_OK), f"out = {out}: {folder} cannot be written")
    present = [name for name in (HISTORY_FILE, *files) if (out / name).exists()]
    if run.resume:
        check_resumable(out, present, [HISTORY_FILE, *phases[0].checkpoint_files])
    elif present and not run.overwrite:
        kind = "a finished run" if is_finished(out) else "an unfinished run"
        kind = kind if HISTORY_FILE in present else ", ".join(present)
        resume = "--resume goes on with it, " if kind == "an unfinished run" else ""
        command = how_to_train_further(out) if kind == "a finished run" else ""
        further = f", and this trains its model further: {command}" if command else ""
        raise InputError(
            f"out = {out} holds {kind}: {resume}--overwrite replaces it, "
            f"--out FOLDER goes elsewhere{further}"
        )


def check_resumable(out: Path, present: list[str], early: list[str]) -> None:
    """Raises InputError where `out`, in which files of the run are `present`, holds no run that has
    ended or can go on. One that was killed when it had written no other files than `early`, which
    come before the first resume point, begins anew."""
    if is_finished(out) or resume_points(out):
        return
    nothing = f"nothing to resume in {out}"
    expected = early if (out / RESUME_FOLDER).is_dir() else [HISTORY_FILE]
    checkpoints = ", ".join(name for name in present if name != HISTORY_FILE)
    require(
        all(name in expected for name in present),
        f"{nothing}: it holds {checkpoints} but no resume point; --overwrite begins anew",
    )
    if not (out / HISTORY_FILE).exists() and not (out / RESUME_FOLDER).is_dir():
        reason = "it holds no run" if out.is_dir() else "there is no such folder"
        raise InputError(f"{nothing}: {reason}; {suggest_run(out)}")


def suggest_run(out: Path) -> str:
    """Returns where the run is that was probably meant instead of `out`: in a folder within it, or
    in one beside it with a similar name."""
    inside = sorted(path.parent for path in out.glob(f"*/{HISTORY_FILE}"))
    beside = {path.parent.name: path.parent for path in out.parent.glob(f"*/{HISTORY_FILE}")}
    near = [beside[name] for name in get_close_matches(out.name, beside, n=1)]
    if inside:
        return f"there are runs in {list_some(inside)}"
    return f"perhaps you meant --out {near[0]}" if near else "--out FOLDER says where the run is"


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
    except BrokenPipeError:  # nobody reads on, as behind `| head`
        raise
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
    if is_finished(out):
        return "all is trained: the same command with --resume goes on to its curves and summary"
    points = resume_points(out)
    if not points:
        return "nothing was kept yet: run the same command with --overwrite"
    return f"{points[-1]} is kept: the same command with --resume goes on from there"


def how_to_train_further(out: Path, changes: Sequence[SettingChange] = ()) -> str:
    """Returns the command that trains the model of the finished run in `out` further: in a new
    folder, on the same text, as its last phase was trained but for `changes`. It takes the steps
    that they add to that phase or, if they add none, as many as the phase had."""
    events = read_history(out / HISTORY_FILE)
    *_, last = select_events(events, "checkpoint")
    record = run_record(events)
    before: dict[str, Any] = flatten_settings(record["config"]) | {"data.source": record["corpus"]}
    before |= {event["setting"]: event["new"] for event in select_events(events, "change")}
    after = before | {c.name: c.new for c in changes if ADJUSTABLE.fullmatch(c.name)}
    phase = f"phases.{record['phases'][-1]}.{{}}" if record["config"]["phases"] else LAST_PHASE
    steps = before[phase.format("steps")]
    added = after[phase.format("steps")] - steps
    default = flatten_settings(json.loads(json.dumps(asdict(single()), default=os.fspath)))
    without_use = HUB_FIELDS if record["corpus"] == "builtin" else ("data.builtin_stories",)
    options = {
        "phases.single.steps": added if added > 0 else steps,
        "phases.single.lr": after[phase.format("lr")],
        "phases.single.batch_size": after[phase.format("batch_size")],
    } | {
        name: value
        for name, value in after.items()
        if name.startswith(PASSED_ON)
        and not name.startswith(NOT_PASSED_ON + without_use)
        and value != default[name]
    }
    flags = [flag for name, value in options.items() for flag in format_option(name, value)]
    command = ["python", "train.py", "single", "--init-from", str(out / last["path"])]
    return shlex.join([*command, "--out", str(new_folder(out)), *flags])


def format_option(name: str, value: object) -> list[str]:
    """Returns the arguments that set the field of a dotted name."""
    section, _, field = name.replace("_", "-").rpartition(".")
    start = f"--{section}." if section else "--"
    if isinstance(value, bool):
        return [f"{start}{'' if value else 'no-'}{field}"]
    return [f"{start}{field}", str(value)]


def new_folder(out: Path) -> Path:
    """Returns a folder beside `out` that is not there yet."""
    path = out if out.name.strip(".") else out.resolve()
    paths = (path.with_name(f"{path.name}-more{number or ''}") for number in count())
    return next(path for path in paths if not path.exists())


def find_checkpoint(path: Path) -> Path:
    """Returns the checkpoint that `path` is, or that of the last phase that the run in the folder
    `path` has finished.

    Raises:
        InputError: for a folder that holds no run, or a run that has finished no phase.
    """
    if not path.is_dir():
        return path
    if not (path / HISTORY_FILE).is_file():
        files = sorted(file.name for file in path.glob("*.pt"))
        if (path / "config.json").is_file():
            hint = f": python -m utils.hf import {path} MODEL.pt makes a checkpoint of that model"
        else:
            hint = f": name one of its files ({list_some(files)})" if files else ""
        raise InputError(f"{path} holds no run (there is no {HISTORY_FILE}){hint}")
    events = select_events(read_history(path / HISTORY_FILE), "checkpoint")
    trained = [event["path"] for event in events if event["trained"]]
    require(bool(trained), f"{path}: the run has finished no phase yet, so it has no trained model")
    return path / trained[-1]


def existing_ancestor(path: Path) -> Path:
    """Returns a path, or the nearest of the folders above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def check_disk(out: Path, phases: list[ResolvedPhase]) -> None:
    """Raises InputError unless the checkpoints to come fit, with the points to resume from."""
    params = [phase.config.num_params for phase in phases]
    checkpoints = zip(params, (len(phase.checkpoint_files) for phase in phases), strict=True)
    weights = CHECKPOINT_BYTES_PER_PARAM * sum(size * files for size, files in checkpoints)
    # The points that are kept and the one that is being written: weights and both moments.
    points = (KEPT_POINTS + 1) * POINT_BYTES_PER_PARAM * max(params)
    free = shutil.disk_usage(existing_ancestor(out)).free
    require(
        free > weights + points,
        f"out = {out}: the checkpoints need {format_gb((weights + points) / 1e9)} of disk, "
        f"{format_gb(free / 1e9)} are free",
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
