"""What goes wrong with a file, and what the program then says and leaves."""

import io
import zlib

import torch

from utils.cli import run_command
from utils.files import DIGITS, MARK

Q = "blocks.0.attn.q_proj.weight"


def tree(folder):
    """Everything in it, to compare."""
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in folder.rglob("*")
        if path.name != "lock"
    }


def code_of(command, capsys):
    """The exit code, and the one line on stderr."""
    capsys.readouterr()
    try:
        run_command(command)
        code = 0
    except SystemExit as leaves:
        code = leaves.code
    said = capsys.readouterr().err
    assert said.count("\n") <= 1, said
    return code, said


def sealed(data):
    """As the program itself would have ended the file."""
    return data + MARK + b"%0*x" % (DIGITS, zlib.crc32(data))


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]


def changed(data, change):
    """The same checkpoint, whole, with something else in it."""
    content, file = torch.load(io.BytesIO(data), weights_only=True), io.BytesIO()
    change(content)
    torch.save(content, file)
    return sealed(file.getvalue())


def poisoned(value):
    return lambda content: content["weights"][Q][0, 3:4].fill_(value)
