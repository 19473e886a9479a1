"""Files that are whole or not there, and that notice when a bit of them has changed."""

import os
import re
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch.serialization import get_crc32_options, set_crc32_options

from config import InputError, require
from utils.signals import held

MARK = b"growthcrc32:"
"""Stands at the end of a file, before the checksum of everything in front of it. A zip archive,
which is what torch saves, may be followed by other bytes."""
DIGITS = 8
PART = ".part"


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its place only once it is complete and on the disk."""
    part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder that takes its place only once all files in it are complete and on the disk; one
    that is there before is then removed, and at once what a killed process had not completed."""
    path = path.resolve()  # through a link: what it points at is replaced, not the link
    of_killed = re.compile(re.escape(f".{path.name}.") + r"\d+(\.old)?" + re.escape(PART))
    for left in filter(lambda beside: of_killed.fullmatch(beside.name), path.parent.iterdir()):
        shutil.rmtree(left)
    part, old = (path.with_name(f".{path.name}.{os.getpid()}{end}{PART}") for end in ("", ".old"))
    part.mkdir()
    try:
        yield part
        for file in part.iterdir():
            with file.open("r+b") as written:
                os.fsync(written.fileno())
        sync_folder(part)
        with held():
            if path.exists():
                path.rename(old)
            part.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises InputError, naming `path`, where the system refuses to have it written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error})") from error


def sweep_parts(folder: Path) -> None:
    """Removes what a killed process had not completed."""
    for part in folder.glob(f".*{PART}"):
        if part.is_file():
            part.unlink()


def is_newer(path: Path, than: Path) -> bool:
    """Whether it was made after the last change of the other, or at the same moment."""
    return path.exists() and path.stat().st_mtime_ns >= than.stat().st_mtime_ns


def sync_folder(folder: Path) -> None:
    """Makes a rename in it durable, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Checksum:
    """Passes on what is written, and keeps its checksum, made by the `other` thread at the same
    time, and what went wrong: torch says only that something did."""

    def __init__(self, file: BinaryIO, other: Executor):
        self.file, self.other, self.crc = file, other, 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        summed = self.other.submit(zlib.crc32, data, self.crc)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        finally:
            self.crc = summed.result()

    def flush(self) -> None:
        self.file.flush()


def save_tensors(path: Path, content: dict, zip_sums: bool = True) -> None:
    """Plain values and tensors, in a file that `torch.load(path, weights_only=True)` reads too.
    Without `zip_sums`, a second checksum of each tensor, it takes less time, and other readers of
    zip archives refuse it.

    Raises OSError where it cannot be written; the file that was there is then still there.
    """
    before = get_crc32_options()
    # Torch's writer survives an error of `write`, but no signal that raises.
    with held(), whole_file(path) as file, ThreadPoolExecutor(1) as other:
        checked = Checksum(file, other)
        set_crc32_options(zip_sums)
        try:
            torch.save(content, cast("BinaryIO", checked))
        except RuntimeError as error:
            raise (checked.error or error) from error
        finally:
            set_crc32_options(before)
        file.write(MARK + b"%0*x" % (DIGITS, checked.crc))


def load_tensors(path: Path) -> dict:
    """On the CPU; nothing in the file is executed. Raises InputError where the file is missing,
    damaged (a single bit is enough) or something else."""
    require(path.is_file(), f"{path}: there is no such checkpoint")
    check(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what another program wrote fails in any way
        raise InputError(f"{path} is no checkpoint ({type(error).__name__})") from error
    require(isinstance(content, dict), f"{path} is no checkpoint")
    return content


def check(path: Path) -> None:
    trailer = len(MARK) + DIGITS
    left, crc = path.stat().st_size - trailer, 0
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 24))):
            crc = zlib.crc32(block, crc)
            left -= len(block)
        sealed = file.read() == MARK + b"%0*x" % (DIGITS, crc)
    require(sealed, f"{path} is damaged or no checkpoint: its checksum does not match")
