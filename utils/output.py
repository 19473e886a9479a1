"""The folder that a run writes, and what it says there about where it ran."""

import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

from config import InputError
from utils.history import read

HISTORY = "training_history.jsonl"
PLOT = "training_curves.png"


def check_folder(out: Path, overwrite: bool) -> None:
    """Raises InputError where `out` cannot be a folder or holds a run that must not be lost."""
    for path in (out, *out.absolute().parents):
        if path.exists() and not path.is_dir():
            raise InputError(f"out = {out}: {path} is a file")
    if overwrite or not (out / HISTORY).exists():
        return
    events = read(out / HISTORY)
    state = "a finished" if events and events[-1]["event"] == "end" else "an unfinished"
    raise InputError(
        f"out = {out} holds {state} run: --overwrite replaces it, --out FOLDER goes elsewhere"
    )


def open_folder(out: Path, files: Iterable[str]) -> None:
    """Makes the folder; of an earlier run there, removes what this one will write anew."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in (HISTORY, PLOT, *files):
            (out / name).unlink(missing_ok=True)
        (out / HISTORY).touch()
    except OSError as error:
        raise InputError(f"out = {out} cannot be written: {error.strerror}") from None


def versions() -> dict[str, str | None]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
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
