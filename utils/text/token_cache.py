"""Folders that are built once and found again. Such a folder is whole or not there, whatever
happens to the process that builds it, and damage to one of its files is noticed."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout

from config import InputError
from utils.runtime.atomic_io import PART_SUFFIX, atomic_folder, file_crc32
from utils.runtime.file_lock import acquire_lock

MANIFEST = "manifest.json"
"""Written last into a folder: its identity, and the checksum of every other file."""


def cached_folder(
    cache: Path,
    identity: list,
    build: Callable[[Path], None],
    warn: Callable[[str], None],
) -> Path:
    """Returns the folder that `identity` stands for, and builds it if it is not there or damaged.
    A folder that is whole is never removed, whoever else is building it.

    Args:
        cache: The folder that holds all such folders.
        identity: Plain values that what is built follows from.
        build: Writes files into the empty folder that it is given.
        warn: Takes a line of text if a damaged folder has to be built again.

    Raises:
        InputError: if the cache has to be written and cannot be.
    """
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    folder = expand_cache(cache) / key
    if find_damage(folder, identity) is None:
        return folder
    try:
        with hold_cache(folder.parent, warn):
            damaged = find_damage(folder, identity)
            if damaged is None:  # another process has built it meanwhile
                return folder
            if os.path.lexists(folder):
                warn(f"data.cache: {folder / damaged} is damaged; the text is tokenized anew")
            if not folder.is_dir():
                folder.unlink(missing_ok=True)
            with atomic_folder(folder, lambda: find_damage(folder, identity) is None) as part:
                build(part)
                write_manifest(part, identity)
    except OSError as error:
        if find_damage(folder, identity) is None:  # another process has finished it
            return folder
        reason = error.strerror or error
        raise InputError(
            f"data.cache = {cache}: cannot be written ({reason}); --data.cache FOLDER goes "
            "elsewhere"
        ) from error
    return folder


def expand_cache(cache: Path) -> Path:
    """Returns the path of the cache with ~ replaced. Raises InputError for ~ of no user."""
    try:
        return cache.expanduser()
    except RuntimeError as error:
        raise InputError(f"data.cache = {cache}: {error}") from error


@contextmanager
def hold_cache(cache: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Lets one process at a time build in the cache, and removes what killed ones left there."""
    cache.mkdir(parents=True, exist_ok=True)
    try:
        lock = acquire_lock(cache / "lock", warn)
    except Timeout as held:
        warn(f"data.cache: waiting for another process that writes into {cache} ({held})")
        lock = acquire_lock(cache / "lock", lambda line: None, timeout_s=-1)
    try:
        for part in cache.glob(f".*{PART_SUFFIX}"):
            shutil.rmtree(part)
        yield
    finally:
        lock.release()


def find_damage(folder: Path, identity: list) -> str | None:
    """Returns the name of the first file that is not as it was written; None if all of them are."""
    name = MANIFEST
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["identity"] != json.loads(json.dumps(identity)):
            return name
        for name, checksum in manifest["checksums"].items():  # `name` is read after an error
            if path_crc32(folder / name) != checksum:
                return name
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return name
    return None


def write_manifest(folder: Path, identity: list) -> None:
    """Notes what a folder stands for and how its files are."""
    checksums = {path.name: path_crc32(path) for path in sorted(folder.iterdir())}
    content = json.dumps({"identity": identity, "checksums": checksums})
    (folder / MANIFEST).write_text(content)


def path_crc32(path: Path) -> int:
    """Returns the checksum of a whole file."""
    with path.open("rb") as file:
        return file_crc32(file)
