"""Where stories come from: files, folders, the hub and the built-in grammar; and which of them
are the validation text.

A story is read as chunks, so that a long one takes no more memory than a short one.
"""

import difflib
import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from config import DataConfig, InputError, require
from utils.runtime import hub
from utils.text.builtin import stories, story_templates, words

SEPARATOR = "<|endoftext|>"
"""Separates the stories of a text file."""
TEXT_SUFFIXES = (".txt", ".txt.gz")
VALID_SPLITS = ("validation", "valid", "test")
"""Names of a dataset's validation split; the first that it has is taken."""
CHUNK_CHARS = 32_768
"""Length of a chunk. Longer texts are cut, so that encoding them is parallel."""
MIN_STORIES = 20
"""With fewer stories than this, the end of the text is the validation text, not whole stories."""


class TextChunk(NamedTuple):
    """A story, or a part of a long one."""

    text: str
    ends_story: bool = True


ReadChunks = Callable[[], Iterator[TextChunk]]
"""Starts reading from the beginning. It can be called again."""


class TextSplits(NamedTuple):
    """The training text of a source, and its validation text if that is kept apart."""

    train: ReadChunks
    valid: ReadChunks | None = None
    """None takes a part of `train` for validation."""


class TextSource(NamedTuple):
    """Something that stories can be read from."""

    identity: list
    """Plain values. The text is the same as long as they are."""
    get_splits: Callable[[], TextSplits]


def find_source(config: DataConfig) -> TextSource:
    """Returns what `data.source` names. Reads no text and asks no hub.

    Raises:
        InputError: for a path that is not there, cannot be read or holds no text file.
    """
    if config.source == "builtin":
        return builtin_source(config.num_stories or DataConfig.num_stories)
    if config.source == "tinystories":
        return hub_source(hub.TINYSTORIES, config.text_field)
    if config.source.startswith("hub:"):
        return hub_source(config.source.removeprefix("hub:"), config.text_field)
    try:
        return path_source(config.source)
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of no user
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"data.source = {config.source}: cannot be read ({reason})") from error


def builtin_source(count: int) -> TextSource:
    """Returns the first `count` built-in stories, of which there is no end."""
    modules = stories, story_templates, words
    code = b"".join(Path(module.__file__ or "").read_bytes() for module in modules)
    splits = TextSplits(lambda: map(TextChunk, stories.builtin_stories(count)))
    return TextSource(["builtin", hashlib.sha256(code).hexdigest(), count], lambda: splits)


def hub_source(name: str, text_field: str) -> TextSource:
    """Returns a dataset on the hub, whose stories are in the column `text_field`."""
    require(bool(name), "data.source = hub: names no dataset")
    identity = ["hub", name, hub.HUB_REVISIONS.get(name), text_field]
    return TextSource(identity, lambda: hub_splits(hub.dataset_splits(name, text_field)))


def hub_splits(texts: dict[str, Callable[[], Iterator[str]]]) -> TextSplits:
    """Returns a dataset's splits to train and to validate on, given all of its splits by name."""

    def reader(split: str) -> ReadChunks:
        return lambda: chunk_stories(text + SEPARATOR for text in texts[split]())

    train = "train" if "train" in texts else next(iter(texts))
    valid = [name for name in VALID_SPLITS if name in texts and name != train]
    return TextSplits(reader(train), reader(valid[0]) if valid else None)


def path_source(source: str) -> TextSource:
    """Returns a text file, or a folder of them in which files named valid* are for validation."""
    path = Path(source).expanduser()
    require(path.exists(), f"data.source = {source}: no such file or folder{suggest_name(path)}")
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if is_text_file(p))
    wanted = " or ".join(TEXT_SUFFIXES)
    require(path.is_dir() or is_text_file(path), f"data.source = {source} is not a {wanted} file")
    require(bool(files), f"data.source = {source}: the folder holds no {wanted} file")
    valid = [file for file in files if path.is_dir() and file.name.startswith("valid")]
    train = [file for file in files if file not in valid]
    require(bool(train), f"data.source = {source}: all its files are validation text (valid*)")
    stats = [(str(file.resolve()), file.stat()) for file in files]
    identity = ["path", *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]
    splits = TextSplits(lambda: read_files(train), (lambda: read_files(valid)) if valid else None)
    return TextSource(identity, lambda: splits)


def is_text_file(path: Path) -> bool:
    """Whether `path` is a file that stories can be read from, by its name."""
    return path.is_file() and path.name.endswith(TEXT_SUFFIXES)


def suggest_name(path: Path) -> str:
    """Returns the name that was probably meant, as the end of a sentence; empty if none is near."""
    names = ["auto", "tinystories", "builtin"]
    if path.parent.is_dir():
        names += [sibling.name for sibling in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" (perhaps {close[0]}?)" if close else ""


def read_files(files: list[Path]) -> Iterator[TextChunk]:
    """Yields the chunks of all stories in some files. A story ends where its file does."""
    for file in files:
        yield from chunk_stories(read_blocks(file))


def read_blocks(path: Path) -> Iterator[str]:
    """Yields the text of a file in blocks of CHUNK_CHARS characters.

    Raises:
        InputError: for a file that cannot be read, is damaged or is not UTF-8.
    """
    open_file = gzip.open if path.suffix == ".gz" else open
    try:
        with open_file(path, "rt", encoding="utf-8-sig") as file:
            while block := file.read(CHUNK_CHARS):
                yield block
    except UnicodeDecodeError as error:
        raise InputError(f"data.source: {path} is not UTF-8 ({error.reason})") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"data.source: {path} is a damaged gzip file ({error})") from error
    except OSError as error:
        raise InputError(f"data.source: {path} cannot be read ({error.strerror})") from error


def chunk_stories(blocks: Iterable[str]) -> Iterator[TextChunk]:
    """Yields the stories of a text that comes in blocks, without the white space around them and
    without blank ones, long ones in several chunks.

    The chunks follow from the story alone, not from the blocks in which its text arrives.
    """
    rest, is_start = "", True  # what has come of a story, and whether it is the story's beginning
    for block in chain(blocks, [SEPARATOR]):
        *ends, rest = (rest + block).split(SEPARATOR)
        for text in ends:
            *chunks, last = cut_long_text(text.strip() if is_start else text.rstrip())
            yield from (TextChunk(chunk, ends_story=False) for chunk in chunks)
            if last or not is_start:
                yield TextChunk(last)
            is_start = True
        *chunks, rest = cut_long_text(rest.lstrip() if is_start else rest)
        yield from (TextChunk(chunk, ends_story=False) for chunk in chunks)
        is_start = is_start and not chunks


def cut_long_text(text: str) -> list[str]:
    """Returns chunks from the front of a text while two more would fit into it, then the rest."""
    chunks = []
    while len(text) > 2 * CHUNK_CHARS:
        end = find_break(text, CHUNK_CHARS)
        chunks.append(text[:end])
        text = text[end:]
    return [*chunks, text]


def find_break(text: str, limit: int) -> int:
    """Returns where to cut a text: before the white space of the last line break in the second
    half of its first `limit` characters, else before other white space there, else at `limit`.

    A byte-level BPE joins white space to what follows it, never to what precedes it, so such a cut
    leaves the tokens as they were.
    """
    for mark in ("\n", " "):
        end = len(text[: max(text.rfind(mark, limit // 2, limit), 0)].rstrip())
        if end:
            return end
    return limit


def mark_validation(
    splits: TextSplits, limit: int, valid_fraction: float
) -> Iterator[tuple[bool, TextChunk]]:
    """Yields every chunk of the first `limit` stories (0: of all), and whether it is validation
    text.

    A validation split of the source is that, up to `valid_fraction` of the limit. Otherwise it is
    every k-th story or, where there are too few stories, the end of the text.
    """

    def read_train() -> Iterator[TextChunk]:
        return take_stories(splits.train(), limit)

    if splits.valid is not None:
        valid = take_stories(splits.valid(), round(limit * valid_fraction) or min(limit, 1))
        yield from ((False, chunk) for chunk in read_train())
        yield from ((True, chunk) for chunk in valid)
        return
    every = max(2, round(1 / valid_fraction))
    enough = max(MIN_STORIES, every)
    ends = filter(attrgetter("ends_story"), read_train())
    if sum(1 for _ in islice(ends, enough)) == enough:
        yield from mark_every_kth(read_train(), every)
    else:
        length = sum(len(chunk.text) for chunk in read_train())
        yield from mark_end(read_train(), round(length * (1 - valid_fraction)))


def take_stories(chunks: Iterator[TextChunk], limit: int) -> Iterator[TextChunk]:
    """Yields the chunks of the first `limit` stories; all of them if `limit` is 0."""
    left = limit
    for chunk in chunks:
        yield chunk
        left -= chunk.ends_story
        if limit and not left:
            return


def mark_every_kth(chunks: Iterator[TextChunk], every: int) -> Iterator[tuple[bool, TextChunk]]:
    """Yields chunks, and True for those of the last of every `every` stories."""
    story = 0
    for chunk in chunks:
        yield story % every == every - 1, chunk
        story += chunk.ends_story


def mark_end(chunks: Iterator[TextChunk], train_chars: int) -> Iterator[tuple[bool, TextChunk]]:
    """Yields chunks, and True for what follows the first `train_chars` characters, from the line
    break before."""
    left = train_chars
    for text, ends_story in chunks:
        if 0 < left < len(text):
            end = find_break(text, left)
            yield False, TextChunk(text[:end])
            yield True, TextChunk(text[end:].lstrip(), ends_story)
        else:
            yield left <= 0, TextChunk(text, ends_story)
        left -= len(text)
