"""Folders that are built once: whole or not there, whatever happens to the process that builds."""

import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from config import InputError

SIZES = "sizes.json"
"""Written last: the size of every other file in the folder."""
PART = ".part"


def folder(cache: Path, identity: list, build: Callable[[Path], None]) -> Path:
    """The folder that `identity` (plain values) stands for; `build` fills it if need be."""
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    path = cache.expanduser() / key
    if is_whole(path):
        return path
    part = start(path)
    try:
        build(part)
        sizes = {file.name: file.stat().st_size for file in part.iterdir()}
        (part / SIZES).write_text(json.dumps(sizes))
        if not is_whole(path):  # another process may have been as quick
            shutil.rmtree(path, ignore_errors=True)
            part.rename(path)
    except OSError as error:
        raise unwritable(cache, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return path


def is_whole(path: Path) -> bool:
    try:
        sizes = json.loads((path / SIZES).read_text())
        return bool(sizes) and all((path / n).stat().st_size == size for n, size in sizes.items())
    except (OSError, ValueError):
        return False


def start(path: Path) -> Path:
    """An empty folder beside `path`, named after this process; those of dead ones are removed."""
    host = socket.gethostname()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for part in path.parent.glob(f"*.{host}.*{PART}"):
            if is_dead(part.name.removesuffix(PART).split(".")[-2]):
                shutil.rmtree(part, ignore_errors=True)
        return Path(tempfile.mkdtemp(PART, f"{path.name}.{host}.{os.getpid()}.", path.parent))
    except OSError as error:
        raise unwritable(path.parent, error) from error


def is_dead(pid: str) -> bool:
    if os.name != "posix" or not pid.isdigit():  # elsewhere asking would end the process
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return int(pid) == os.getpid()  # this one builds one at a time: an earlier one had its number


def unwritable(cache: Path, error: OSError) -> InputError:
    return InputError(f"data.cache = {cache}: cannot be written ({error.strerror or error})")
