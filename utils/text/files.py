"""Reads text files: plain text, JSON and parquet, each also compressed.

The kind of a file and its compression follow from its name, in upper or lower case.
"""

import codecs
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from config import InputError, require
from utils.runtime.records import choose_text_field, find_text_field, read_texts

PLAIN_KINDS = (".txt", ".md")
RECORD_KINDS = (".jsonl", ".json", ".parquet")
READABLE = " ".join(PLAIN_KINDS + RECORD_KINDS) + ", also as .gz, .xz or .zst"
BLOCK_CHARS = 32_768
"""Characters of a plain file to read at a time."""
BLOCK_BYTES = 1 << 16
"""Bytes at a file's beginning to judge its encoding by, and to decode at a time."""
MIN_NUL_SHARE = 0.04
"""Share of bytes that are NUL in a text in UTF-16: half in English, and with every space and line
break in other scripts."""


def open_zst(path: Path) -> IO[bytes]:
    """Opens a file that zstd has compressed."""
    import pyarrow

    return pyarrow.CompressedInputStream(str(path), "zstd")


COMPRESSIONS = {".gz": gzip.open, ".xz": lzma.open, ".zst": open_zst}


def split_name(name: str) -> tuple[str, str]:
    """Returns a file's name without the ends that say how it is read, and its kind, such as
    `.txt` for `A.TXT.gz`; the kind is empty if it cannot be read."""
    path = Path(name)
    path = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    kind = path.suffix.lower()
    return (path.stem, kind) if kind in PLAIN_KINDS + RECORD_KINDS else (name, "")


def find_files(folder: Path) -> list[Path]:
    """Returns all files in a folder and its subfolders, relative to it and sorted, but hidden ones
    and what macOS keeps of its own. A folder that several links lead to is entered once."""
    files, seen = [], {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=raise_error):
        visible, folders[:] = sorted(filter(is_visible, folders)), []
        for name in visible:
            real = os.path.realpath(Path(parent, name))
            if real not in seen:
                seen.add(real)
                folders.append(name)
        files += [Path(parent, name) for name in filter(is_visible, names)]
    return sorted(path.relative_to(folder) for path in files if path.is_file())


def raise_error(error: OSError) -> None:
    """Raises an error that a caller would otherwise not hear of."""
    raise error


def is_visible(name: str) -> bool:
    """Whether a file or folder is neither hidden nor macOS's own."""
    return not name.startswith(".") and name != "__MACOSX"


def open_binary(path: Path) -> IO[bytes]:
    """Opens a file to read its bytes, those that were compressed."""
    opener: Callable[[Path], Any] | None = COMPRESSIONS.get(path.suffix.lower())
    return opener(path) if opener else path.open("rb")


def detect_encoding(path: Path) -> str:
    """Returns the encoding of a text: UTF-8, or UTF-16, which is recognised by its mark or by the
    NUL bytes that every second byte of a space or of English is.

    Raises:
        InputError: for a file that holds NUL bytes and is neither.
    """
    with open_binary(path) as file:
        head = file.read(BLOCK_BYTES)
    is_utf32 = head.startswith(codecs.BOM_UTF32_LE)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and not is_utf32:
        return "utf-16"
    even, odd = head[::2].count(0), head[1::2].count(0)
    if not even + odd:
        return "utf-8-sig"
    encoding = "utf-16-le" if odd > even else "utf-16-be"
    decoded = head.decode(encoding, "ignore")
    num_text = sum(char.isprintable() or char.isspace() for char in decoded)
    is_clear = max(even, odd) >= max(MIN_NUL_SHARE * len(head), 9 * min(even, odd))
    require(
        is_clear and not is_utf32 and num_text > 0.9 * len(decoded),
        f"data.source: {path} is not text: it has NUL bytes (the first at offset {head.index(0)}) "
        "and is not UTF-16; save it as UTF-8",
    )
    return encoding


def encoding_name(path: Path) -> str:
    """Returns how a text file is encoded, UTF-8 or UTF-16; UTF-8 for parquet. Raises InputError as
    `open_text` does."""
    if split_name(path.name)[1] == ".parquet":
        return "UTF-8"
    with explain_damage(path):
        return "UTF-8" if detect_encoding(path).startswith("utf-8") else "UTF-16"


@contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """Opens a text file, with line breaks as "\\n".

    Raises:
        InputError: naming the file, and the place in it where there is one, if it cannot be read,
            is damaged or is not text.
    """
    with explain_damage(path):
        encoding = detect_encoding(path)
        try:
            with io.TextIOWrapper(open_binary(path), encoding) as file:
                yield file
        except UnicodeDecodeError as error:
            raise InputError(describe_undecodable(path, encoding)) from error


@contextmanager
def explain_damage(path: Path) -> Iterator[None]:
    """Raises InputError, naming the file, where it cannot be read or is damaged."""
    try:
        yield
    except OSError as error:
        what = f"cannot be read ({error.strerror})" if error.errno else f"is damaged ({error})"
        raise InputError(f"data.source: {path} {what}") from error
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"data.source: {path} is damaged ({error})") from error


def describe_undecodable(path: Path, encoding: str) -> str:
    """Returns where the first bytes of a file are that cannot be decoded."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line, offset, block = 1, 0, b""
    try:
        with open_binary(path) as file:
            while block := file.read(BLOCK_BYTES):
                line += decoder.decode(block).count("\n")
                offset += len(block)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        # `object` holds, before the block, what was left of the one before.
        offset += len(block) - len(error.object) + error.start
        line += error.object[: error.start].decode(encoding, "ignore").count("\n")
        return (
            f"data.source: {path} is not {encoding_name(path)}: line {line}, byte offset {offset} "
            f"(0x{error.object[error.start]:02x}, {error.reason})"
        )
    return f"data.source: {path} changed while it was read; run again"


def read_blocks(path: Path) -> Iterator[str]:
    """Yields the text of a plain file in blocks of BLOCK_CHARS characters. Raises InputError as
    `open_text` does."""
    with open_text(path) as file:
        while block := file.read(BLOCK_CHARS):
            yield block


def read_rows(path: Path) -> Iterator[object]:
    """Yields what a JSON file holds: the values of its lines or, in a .json file that is one value,
    the elements of that if it is a list, or else that itself.

    Raises:
        InputError: naming file and line, for what is not JSON, and as `open_text` does.
    """
    with open_text(path) as file:
        if split_name(path.name)[1] == ".json":
            content = file.read()
            try:
                value = json.loads(content)
            except json.JSONDecodeError as error:
                if error.msg != "Extra data":  # a second line follows the first value
                    message = f"data.source: {path}, line {error.lineno} is not JSON ({error.msg})"
                    raise InputError(message) from error
                yield from parse_lines(io.StringIO(content), path)
            else:
                yield from value if isinstance(value, list) else [value]
        else:
            yield from parse_lines(file, path)


def parse_lines(lines: Iterable[str], path: Path) -> Iterator[object]:
    """Yields the value of each line that is not blank. Raises InputError for one that is not
    JSON."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                message = f"data.source: {path}, line {number} is not JSON ({error.msg})"
                raise InputError(message) from error


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """Opens a parquet file, a compressed one in memory. Raises InputError if it is damaged."""
    import pyarrow
    from pyarrow import parquet

    with explain_damage(path), open_binary(path) as file:
        try:
            is_compressed = path.suffix.lower() in COMPRESSIONS
            yield parquet.ParquetFile(io.BytesIO(file.read()) if is_compressed else file)
        except pyarrow.ArrowInvalid as error:
            raise InputError(f"data.source: {path} is damaged ({error})") from error


def read_column(path: Path, field: str) -> Iterator[dict]:
    """Yields the rows of a parquet file, with one of its columns."""
    with open_parquet(path) as table:
        for batch in table.iter_batches(batch_size=1024, columns=[field], use_threads=False):
            yield from batch.to_pylist()


def file_text_field(path: Path, wanted: str) -> str:
    """Returns the field of the text in a JSON or parquet file; empty where its rows are texts.

    Raises:
        NoTextField: if it cannot be told, or the wanted field is not there.
        InputError: if the file cannot be read.
    """
    if split_name(path.name)[1] != ".parquet":
        return find_text_field(wanted, read_rows(path), str(path))
    import pyarrow

    with open_parquet(path) as table:
        schema = table.schema_arrow
        is_text = (pyarrow.types.is_string, pyarrow.types.is_large_string)
        texts = [f.name for f in schema if any(check(f.type) for check in is_text)]
        return choose_text_field(wanted, schema.names, texts, str(path))


def read_record_texts(path: Path, wanted: str, null_rows: dict[str, int]) -> Iterator[str]:
    """Yields the texts of a JSON or parquet file; see `read_texts` and `file_text_field`."""
    field = file_text_field(path, wanted)
    is_parquet = split_name(path.name)[1] == ".parquet"
    rows = read_column(path, field) if is_parquet else read_rows(path)
    return read_texts(rows, field, str(path), null_rows)
