"""What goes wrong with a file, and what a command then says and leaves."""

import io
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from utils.runtime.atomic_io import checksum_trailer
from utils.runtime.cli import run_command

PARAM = "blocks.0.attn.q_proj.weight"


def snapshot_folder(folder: Path) -> dict[Path, tuple[int, bytes | None]]:
    """Returns the time of change and the content of everything in a folder but its lock."""
    return {
        path.relative_to(folder): (
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else None,
        )
        for path in folder.rglob("*")
        if path.name != "lock"
    }


def capture_command(
    command: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> tuple[int | str | None, str, str]:
    """Runs a command. Returns its exit code, its stdout, and its stderr, which is one line at
    most."""
    capsys.readouterr()
    try:
        run_command(command)
        code = 0
    except SystemExit as stop:
        code = stop.code
    output, error = capsys.readouterr()
    assert error.count("\n") <= 1, error
    return code, output, error


def add_checksum(data: bytes) -> bytes:
    """Returns a file with the end that the program itself would have given it."""
    return data + checksum_trailer(zlib.crc32(data))


def flip_bit(data: bytes, position: int) -> bytes:
    """Returns `data` with one bit of the byte at `position` flipped."""
    return data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :]


def edit_content(data: bytes, edit: Callable[[dict], object]) -> bytes:
    """Returns the file of a checkpoint after `edit` has changed its content, with a checksum that
    matches."""
    content, file = torch.load(io.BytesIO(data), weights_only=True), io.BytesIO()
    edit(content)
    torch.save(content, file)
    return add_checksum(file.getvalue())


def set_one_weight(value: float) -> Callable[[dict], object]:
    """Returns an edit that sets one entry of PARAM."""
    return lambda content: content["weights"][PARAM][0, 3:4].fill_(value)
