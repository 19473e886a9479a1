"""Files and folders that are whole or not there, and files that notice when a bit of them
changes."""

import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch.serialization import get_crc32_options, set_crc32_options

from config import InputError, require
from utils.runtime.signals import defer_signals

CHECKSUM_TAG = b"growthcrc32:"
"""Stands at the end of a file, before the checksum of everything in front of it. A zip archive,
which is what torch saves, may be followed by other bytes."""
CHECKSUM_DIGITS = 8
ZIP_END_TAG, ZIP_END_BYTES = b"PK\5\6", 22
"""The last record of a zip archive."""
PART_SUFFIX = ".part"
READ_BYTES = 1 << 24


def part_path(path: Path) -> Path:
    """Returns where this process writes a file before that is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}{PART_SUFFIX}")


def written_bytes(path: Path) -> int:
    """Returns how much of a file that this process writes, or has written, is there."""
    for written in (part_path(path), path):
        with suppress(OSError):  # it takes its place between two looks
            return written.stat().st_size
    return 0


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a file that takes its place only once it is complete and on the disk."""
    part = part_path(path)
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        fsync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, keep: Callable[[], bool] = lambda: False) -> Iterator[Path]:
    """Yields a folder that takes its place only once all files in it are complete and on the disk.
    A folder that is there before is removed then, unless `keep` finds that it has become as good
    meanwhile; and at once what killed processes had not completed."""
    path = path.resolve()  # through a link: what it points at is replaced, not the link
    leftover = re.compile(re.escape(f".{path.name}.") + r"\d+(\.old)?" + re.escape(PART_SUFFIX))
    for sibling in path.parent.iterdir():
        if leftover.fullmatch(sibling.name) and sibling.is_dir():
            shutil.rmtree(sibling)
    part, old = (
        path.with_name(f".{path.name}.{os.getpid()}{end}{PART_SUFFIX}") for end in ("", ".old")
    )
    part.mkdir()
    try:
        yield part
        fsync_files(part)
        with defer_signals():
            if not keep():
                if path.exists():
                    path.rename(old)
                part.rename(path)
        fsync_folder(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Raises InputError, naming `path`, where the system refuses to have it written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error})") from error


def remove_partial_files(folder: Path) -> None:
    """Removes the files that a killed process had not completed."""
    for part in folder.glob(f".*{PART_SUFFIX}"):
        if part.is_file():
            part.unlink()


def is_newer(path: Path, than: Path) -> bool:
    """Whether `path` was written after the last change of `than`, or at the same moment."""
    return path.exists() and path.stat().st_mtime_ns >= than.stat().st_mtime_ns


def fsync_folder(folder: Path) -> None:
    """Makes renames in a folder durable, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def fsync_files(folder: Path) -> None:
    """Makes all files in a folder durable."""
    for path in folder.iterdir():
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    fsync_folder(folder)


def file_crc32(file: BinaryIO, size: int | None = None) -> int:
    """Returns the CRC-32 of the next `size` bytes of an open file, of all that is left if None."""
    crc, left = 0, size
    while block := file.read(READ_BYTES if left is None else min(left, READ_BYTES)):
        crc = zlib.crc32(block, crc)
        left = None if left is None else left - len(block)
    return crc


class ChecksumWriter:
    """Writes to a file and keeps its checksum, made by another thread at the same time, and the
    error that stopped it: torch says only that there was one."""

    def __init__(self, file: BinaryIO, executor: Executor):
        self.file, self.executor, self.crc = file, executor, 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Writes `data` and adds it to the checksum."""
        crc = self.executor.submit(zlib.crc32, data, self.crc)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        finally:
            self.crc = crc.result()

    def flush(self) -> None:
        """Flushes the file."""
        self.file.flush()


ADD_CHECKSUM = (
    "; save_checkpoint(path, load_checkpoint(path, unchecked=True)) of utils.checkpoint.model "
    "writes it with one"
)
"""The remedy for a checkpoint without a checksum, where no option reads it all the same."""


def save_tensors(path: Path, content: dict, zip_sums: bool = True) -> int:
    """Writes plain values and tensors, whole or not at all, in a file that `torch.load(path,
    weights_only=True)` reads too. Returns the checksum that stands at its end.

    Args:
        path: The file.
        content: What to write.
        zip_sums: Write zip's own checksum of each tensor too. Without them writing takes less time,
            and other readers of zip archives refuse the file.

    Raises:
        OSError: if it cannot be written; the file that was there is then still there.
    """
    before = get_crc32_options()
    # Torch's writer survives an error of `write`, but no signal that raises.
    with defer_signals(), atomic_file(path) as file, ThreadPoolExecutor(1) as executor:
        writer = ChecksumWriter(file, executor)
        set_crc32_options(zip_sums)
        try:
            torch.save(content, cast("BinaryIO", writer))
        except RuntimeError as error:
            raise (writer.error or error) from error
        finally:
            set_crc32_options(before)
        file.write(checksum_trailer(writer.crc))
    return writer.crc


def load_tensors(path: Path, unchecked: bool = False, remedy: str = "") -> dict:
    """Reads what `save_tensors` wrote onto the CPU; nothing in the file is executed.

    Args:
        path: The file.
        unchecked: Read it also where its checksum is missing, which `torch.save` does not write.
        remedy: What to do about a checksum that is missing, for the error that says so.

    Raises:
        InputError: if the file is missing, damaged (a single bit is enough) or something else.
    """
    require(path.is_file(), f"{path}: there is no such checkpoint")
    if not (unchecked and ends_as_zip(path)):
        verify_checksum(path, remedy)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what another program wrote fails in any way
        raise InputError(f"{path} is no checkpoint ({type(error).__name__})") from error
    require(isinstance(content, dict), f"{path} is no checkpoint")
    return content


def checksum_trailer(crc: int) -> bytes:
    """Returns the bytes that end a file with that checksum."""
    return CHECKSUM_TAG + b"%0*x" % (CHECKSUM_DIGITS, crc)


def ends_with_checksum(path: Path, crc: int) -> bool:
    """Whether a file is there and ends with a checksum, which need not be right."""
    trailer = checksum_trailer(crc)
    return path.is_file() and read_end(path, len(trailer)) == trailer


def ends_as_zip(path: Path) -> bool:
    """Whether a file ends as what torch saves does, a zip archive, with no checksum behind it."""
    return read_end(path, ZIP_END_BYTES).startswith(ZIP_END_TAG)


def read_end(path: Path, size: int) -> bytes:
    """Returns the last `size` bytes of a file, or all where it has fewer."""
    with path.open("rb") as file:
        file.seek(-min(size, path.stat().st_size), os.SEEK_END)
        return file.read()


def verify_checksum(path: Path, remedy: str = "") -> None:
    """Raises InputError unless the file ends with the checksum of what is in front of it, with
    `remedy` where it has none."""
    require(
        not ends_as_zip(path),
        f"{path}: its checksum is missing, as where torch.save has written it again{remedy}",
    )
    size = path.stat().st_size - len(CHECKSUM_TAG) - CHECKSUM_DIGITS
    with path.open("rb") as file:
        crc = file_crc32(file, max(size, 0))
        is_intact = file.read() == checksum_trailer(crc)
    require(is_intact, f"{path} is damaged or no checkpoint: its checksum does not match")
