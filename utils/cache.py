"""Folders that are built once: whole or not there, whatever happens to the process that builds."""

import hashlib
import json
import os
import shutil
import socket
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from config import InputError
from utils.files import sync_folder

MANIFEST = "manifest.json"
"""Written last: what the folder stands for, and the mark of every other file."""
PART = ".part"
BLOCK = 1 << 20


def folder(
    cache: Path, identity: list, build: Callable[[Path], None], say: Callable[[str], None]
) -> Path:
    """The folder that `identity` (plain values) stands for; `build` fills it if need be."""
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    path = expanded(cache) / key
    if not (bad := damage(path, identity)):
        return path
    if os.path.lexists(path):
        say(f"data.cache: {path / bad} is damaged; the text is tokenized anew")
    part = start(path)
    try:
        build(part)
        seal(part, identity)
        if damage(path, identity):  # another process may have been as quick
            remove(path)
            part.rename(path)
            sync_folder(path.parent)
    except OSError as error:
        raise unwritable(cache, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return path


def expanded(cache: Path) -> Path:
    try:
        return cache.expanduser()
    except RuntimeError as error:
        raise InputError(f"data.cache = {cache}: {error}") from error


def damage(path: Path, identity: list) -> str:
    """The first file that is not as it was written; empty where all are."""
    name = MANIFEST
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["identity"] != json.loads(json.dumps(identity)):
            return name
        for name, written in manifest["files"].items():  # it is read after the loop
            if mark(path / name) != written:
                return name
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return name
    return ""


def mark(path: Path) -> list[int]:
    """Size and checksum."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            crc = zlib.crc32(block, crc)
        return [file.tell(), crc]


def seal(part: Path, identity: list) -> None:
    """Writes down how the files are, and leaves all of it on the disk."""
    files = {file.name: mark(file) for file in sorted(part.iterdir())}
    (part / MANIFEST).write_text(json.dumps({"identity": identity, "files": files}))
    for path in part.iterdir():
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    sync_folder(part)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
    reason = error.strerror or error
    return InputError(
        f"data.cache = {cache}: cannot be written ({reason}); --data.cache FOLDER goes elsewhere"
    )
