"""Where stories come from: files, folders and the built-in grammar; and which are held out."""

import difflib
import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from config import DataConfig, InputError, require
from utils import hub, plots, stories, words

SEPARATOR = "<|endoftext|>"
SUFFIXES = (".txt", ".txt.gz")
PIECE = 32_768
"""Characters. A longer text is cut, so that encoding it is parallel and takes no more memory."""
FEW = 20
"""With fewer stories than this none is held out whole."""


class Piece(NamedTuple):
    """A story, or a part of one that is long."""

    text: str
    ends: bool = True
    """The story ends here."""


Read = Callable[[], Iterator[Piece]]
"""Starts reading from the beginning; it can be called again."""


class Splits(NamedTuple):
    train: Read
    valid: Read | None = None
    """None: a share of the other is to be held out."""


class Source(NamedTuple):
    identity: list
    """Plain values; the text is the same as long as they are."""
    open: Callable[[], Splits]


def find(config: DataConfig) -> Source:
    """What `data.source` names. Nothing is read yet, and no hub is asked."""
    if config.source == "builtin":
        return builtin(config.num_stories or DataConfig.num_stories)
    if config.source == "tinystories":
        return from_hub(hub.TINYSTORIES, config.text_field)
    if config.source.startswith("hub:"):
        return from_hub(config.source.removeprefix("hub:"), config.text_field)
    try:
        return from_path(config.source)
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of no user
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"data.source = {config.source}: cannot be read ({reason})") from error


def builtin(count: int) -> Source:
    """The built-in stories never end, so the caller says how many."""
    code = b"".join(Path(module.__file__ or "").read_bytes() for module in (stories, plots, words))
    digest = hashlib.sha256(code).hexdigest()
    splits = Splits(lambda: map(Piece, stories.stories(count)))
    return Source(["builtin", digest, count], lambda: splits)


def from_hub(name: str, text_field: str) -> Source:
    require(bool(name), "data.source = hub: names no dataset")
    identity = ["hub", name, hub.REVISIONS.get(name), text_field]
    return Source(identity, lambda: hub_splits(hub.texts(name, text_field)))


def hub_splits(texts: dict[str, Callable[[], Iterator[str]]]) -> Splits:
    def reader(split: str) -> Read:
        return lambda: cut(text + SEPARATOR for text in texts[split]())

    train = "train" if "train" in texts else next(iter(texts))
    held = [name for name in ("validation", "valid", "test") if name in texts and name != train]
    return Splits(reader(train), reader(held[0]) if held else None)


def from_path(source: str) -> Source:
    path = Path(source).expanduser()
    require(path.exists(), f"data.source = {source}: no such file or folder{perhaps(path)}")
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if is_text(p))
    wanted = " or ".join(SUFFIXES)
    require(path.is_dir() or is_text(path), f"data.source = {source} is not a {wanted} file")
    require(bool(files), f"data.source = {source}: the folder holds no {wanted} file")
    valid = [file for file in files if path.is_dir() and file.name.startswith("valid")]
    train = [file for file in files if file not in valid]
    require(bool(train), f"data.source = {source}: all its files are held-out text (valid*)")
    stats = [(str(file.resolve()), file.stat()) for file in files]
    splits = Splits(lambda: read_files(train), (lambda: read_files(valid)) if valid else None)
    identity = ["path", *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]
    return Source(identity, lambda: splits)


def is_text(path: Path) -> bool:
    return path.is_file() and path.name.endswith(SUFFIXES)


def perhaps(path: Path) -> str:
    """The name that was probably meant, as the end of a sentence."""
    names = ["auto", "tinystories", "builtin"]
    if path.parent.is_dir():
        names += [sibling.name for sibling in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" (perhaps {close[0]}?)" if close else ""


def read_files(files: list[Path]) -> Iterator[Piece]:
    for file in files:
        yield from cut(blocks(file))


def blocks(path: Path) -> Iterator[str]:
    """The text of a file, a little at a time."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            while block := file.read(PIECE):
                yield block
    except UnicodeDecodeError as error:
        raise InputError(f"data.source: {path} is not UTF-8 ({error.reason})") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"data.source: {path} is a damaged gzip file ({error})") from error
    except OSError as error:
        raise InputError(f"data.source: {path} cannot be read ({error.strerror})") from error


def cut(text: Iterable[str]) -> Iterator[Piece]:
    """Stories without the white space around them, long ones in pieces.

    The pieces follow from the story alone, not from the blocks in which its text arrives.
    """
    rest, fresh = "", True
    for block in text:
        *whole, rest = (rest + block).split(SEPARATOR)
        for story in whole:
            yield from finish(story, fresh)
            fresh = True
        *pieces, rest = shorten(rest.lstrip() if fresh else rest)
        for piece in pieces:
            yield Piece(piece, ends=False)
            fresh = False
    yield from finish(rest, fresh)


def finish(story: str, fresh: bool) -> Iterator[Piece]:
    """The end of a story; all of it where it is `fresh`, and then nothing if it is blank."""
    *pieces, last = shorten(story.strip() if fresh else story.rstrip())
    for piece in pieces:
        yield Piece(piece, ends=False)
    if last or not fresh:
        yield Piece(last)


def shorten(text: str) -> list[str]:
    """Pieces off the front while two would fit, then the rest."""
    pieces = []
    while len(text) > 2 * PIECE:
        at = break_before(text, PIECE)
        pieces.append(text[:at])
        text = text[at:]
    return [*pieces, text]


def break_before(text: str, limit: int) -> int:
    """Where to cut `text`: before the white space of a line break, or of any, or at the limit.

    A byte-level BPE joins white space to what follows it, never to what precedes it, so such a cut
    leaves the tokens as they were.
    """
    for mark in ("\n", " "):
        at = len(text[: max(text.rfind(mark, limit // 2, limit), 0)].rstrip())
        if at:
            return at
    return limit


def held_out(splits: Splits, limit: int, share: float) -> Iterator[tuple[bool, Piece]]:
    """Every piece of the first `limit` stories (0: of all), and whether it is held out.

    A split of the source's own is held out, up to the same `share` of the limit. Otherwise it is
    every k-th story or, where there are too few, the end of the text.
    """

    def read() -> Iterator[Piece]:
        return first(splits.train(), limit)

    if splits.valid is not None:
        valid = first(splits.valid(), round(limit * share) or min(limit, 1))
        yield from ((False, piece) for piece in read())
        yield from ((True, piece) for piece in valid)
        return
    every = max(2, round(1 / share))
    enough = max(FEW, every)
    if sum(1 for _ in islice(filter(attrgetter("ends"), read()), enough)) == enough:
        yield from by_story(read(), every)
    else:
        length = sum(len(piece.text) for piece in read())
        yield from by_length(read(), round(length * (1 - share)))


def first(pieces: Iterator[Piece], limit: int) -> Iterator[Piece]:
    left = limit
    for piece in pieces:
        yield piece
        left -= piece.ends
        if limit and not left:
            return


def by_story(pieces: Iterator[Piece], every: int) -> Iterator[tuple[bool, Piece]]:
    story = 0
    for piece in pieces:
        yield story % every == every - 1, piece
        story += piece.ends


def by_length(pieces: Iterator[Piece], left: int) -> Iterator[tuple[bool, Piece]]:
    """The first `left` characters to train on, then the rest, cut at a line break."""
    for text, ends in pieces:
        if left <= 0:
            yield True, Piece(text, ends)
        elif len(text) <= left:
            yield False, Piece(text, ends)
        else:
            at = break_before(text, left)
            yield False, Piece(text[:at])
            yield True, Piece(text[at:].lstrip(), ends)
        left -= len(text)
