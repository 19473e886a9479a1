"""Where stories come from: files, folders, the hub and the built-in grammar; and which of them
are the validation text.

A story is read as chunks, so that a long one takes no more memory than a short one.
"""

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

from config import DataConfig, InputError, require
from utils.runtime import hub
from utils.runtime.formatting import list_some
from utils.runtime.records import NoTextField
from utils.text.builtin import stories, story_templates, words
from utils.text.files import (
    PLAIN_KINDS,
    READABLE,
    encoding_name,
    file_text_field,
    find_files,
    read_blocks,
    read_record_texts,
    split_name,
)
from utils.text.held_out import TEST, TRAIN, VALID, choose_documents, sort_files, splits_for

SEPARATOR = "<|endoftext|>"
"""Separates the stories of a text file."""
CHUNK_CHARS = 32_768
"""Length of a chunk. Longer texts are cut, so that encoding them is parallel."""
HUB_STORIES = 50_000
"""Stories to read from the hub unless `data.num_stories` says how many."""


class TextChunk(NamedTuple):
    """A story, or a part of a long one."""

    text: str
    ends_story: bool = True


ReadChunks = Callable[[], Iterator[TextChunk]]
"""Starts reading from the beginning. It can be called again."""


@dataclass
class TextRecord:
    """What a text is made of, by the names of its files or splits, and what is missing from it."""

    train: list[str] = field(default_factory=list)
    """What is trained on."""
    valid: list[str] = field(default_factory=list)
    """What is kept apart for validation; empty where that is taken from the training text."""
    left_out: list[str] = field(default_factory=list)
    """What is not read, each with the reason in brackets."""
    encodings: dict[str, str] = field(default_factory=dict)
    """How files of text are encoded that are not in UTF-8."""
    null_rows: dict[str, int] = field(default_factory=dict)
    """Rows without a text that were left out, by file or split, once it has been read."""
    is_cut: bool = False
    """Whether there is more text than `data.num_stories`, once that has been read."""
    splits_document: bool = False
    """Whether the validation text is the end of a document of which the rest is trained on."""


class TextSplits(NamedTuple):
    """The training text of a source, and its validation text if that is kept apart."""

    train: ReadChunks
    valid: ReadChunks | None
    """None takes a part of `train` for validation."""
    record: TextRecord
    """What they are made of. Reading them completes it."""


class TextSource(NamedTuple):
    """Something that stories can be read from."""

    identity: list
    """Plain values. The text is the same as long as they are."""
    limit: int
    """Largest number of stories to read. 0 reads all."""
    get_splits: Callable[[], TextSplits]


def find_source(config: DataConfig) -> TextSource:
    """Returns what `data.source` names. Reads no text and asks no hub.

    Raises:
        InputError: for a path that is not there, cannot be read or holds no text file.
    """
    if config.source == "builtin":
        return builtin_source(config.num_stories or config.builtin_stories)
    if config.source == "tinystories":
        return hub_source(hub.TINYSTORIES, config)
    if config.source.startswith("hub:"):
        return hub_source(config.source.removeprefix("hub:"), config)
    try:
        return path_source(config)
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of no user
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"data.source = {config.source}: cannot be read ({reason})") from error


def builtin_source(count: int) -> TextSource:
    """Returns the first `count` built-in stories, of which there is no end."""
    modules = stories, story_templates, words
    code = b"".join(Path(module.__file__ or "").read_bytes() for module in modules)
    identity = ["builtin", hashlib.sha256(code).hexdigest()]

    def get_splits() -> TextSplits:
        reread = spool(stories.builtin_stories(count))
        return TextSplits(lambda: map(TextChunk, reread()), None, TextRecord(["built-in stories"]))

    return TextSource(identity, count, get_splits)


def hub_source(name: str, config: DataConfig) -> TextSource:
    """Returns a dataset on the hub, whose stories are in the column `data.text_field`."""
    require(bool(name), "data.source = hub: names no dataset")
    options = [config.text_field, config.config, config.split, config.valid_split]
    identity = ["hub", name, hub.HUB_REVISIONS.get(name), *options]
    limit = HUB_STORIES if config.num_stories is None else config.num_stories
    return TextSource(identity, limit, lambda: hub_splits(name, config))


def hub_splits(name: str, config: DataConfig) -> TextSplits:
    """Returns a dataset's splits to train and to validate on.

    Raises:
        InputError: listing the splits that there are, where none is for training or has the name
            that the user gives.
    """
    record = TextRecord()
    texts = hub.dataset_splits(name, config.text_field, config.config, record.null_rows)
    listed = ", ".join(texts)
    for option, split in (("split", config.split), ("valid_split", config.valid_split)):
        message = f"data.{option} = {split}: dataset {name} has no such split, only {listed}"
        require(not split or split in texts, message)
    train = [config.split] if config.split else splits_for(TRAIN, texts)
    record.train = [split for split in train if split != config.valid_split]
    require(
        bool(record.train),
        f"data.source: dataset {name} has no split to train on, only {listed}; --data.split NAME "
        "chooses one",
    )
    valid = [config.valid_split] if config.valid_split else splits_for(VALID, texts)
    record.valid = [split for split in valid if split not in record.train]
    record.left_out = [f"{split} (split)" for split in texts if split not in record.train + valid]

    def read(splits: list[str]) -> Iterator[str]:
        return chain.from_iterable(texts[split]() for split in splits)

    if record.valid:
        return TextSplits(
            lambda: chunk_texts(read(record.train)), lambda: chunk_texts(read(record.valid)), record
        )
    reread = spool(read(record.train))
    return TextSplits(lambda: chunk_texts(reread()), None, record)


def spool(texts: Iterator[str]) -> Callable[[], Iterator[str]]:
    """Returns a function that yields the texts from the first on whenever it is called; each is
    taken once and then kept in a temporary file. One call at a time may be read."""
    file = TemporaryFile()  # noqa: SIM115  # closed and gone with the function

    def read() -> Iterator[str]:
        file.seek(0)
        for line in file:
            yield json.loads(line)
        for text in texts:
            file.write(json.dumps(text).encode() + b"\n")
            yield text

    return read


def chunk_texts(texts: Iterable[str]) -> Iterator[TextChunk]:
    """Yields the chunks of texts that are a story each, or several."""
    return chunk_stories(text + SEPARATOR for text in texts)


def path_source(config: DataConfig) -> TextSource:
    """Returns a text file, or a folder of them with its subfolders, in which files are trained on,
    validated on or left out by their names."""
    source, path = config.source, Path(config.source).expanduser()
    require(path.exists(), f"data.source = {source}: no such file or folder{suggest_name(path)}")
    if path.is_dir():
        folder, files = path, find_files(path)
    else:
        folder, files = path.parent, [Path(path.name)]
    unread = [file for file in files if not split_name(file.name)[1]]
    readable = [file for file in files if split_name(file.name)[1]]
    kinds = sort_files(readable) if path.is_dir() else {TRAIN: readable, VALID: [], TEST: []}
    require(path.is_dir() or not unread, f"data.source = {source} is not a {READABLE} file")
    require(bool(readable), f"data.source = {source}: the folder holds no {READABLE} file")
    require(
        bool(kinds[TRAIN]),
        f"data.source = {source}: all its files are validation or test text by their names "
        f"({list_some(readable)}); data.source = one of them trains on it",
    )
    stats = [(kind, str(f), (folder / f).stat()) for kind in (TRAIN, VALID) for f in kinds[kind]]
    identity = [
        "path",
        str(folder.resolve()),
        config.text_field,
        [[kind, name, stat.st_size, stat.st_mtime_ns] for kind, name, stat in stats],
        [str(file) for file in kinds[TEST] + unread],
    ]
    left_out = [f"{file} (test text)" for file in kinds[TEST]]
    left_out += [f"{file} (not text)" for file in unread]
    return TextSource(
        identity, config.num_stories or 0, lambda: path_splits(config, folder, kinds, left_out)
    )


def path_splits(
    config: DataConfig, folder: Path, kinds: dict[str, list[Path]], left_out: list[str]
) -> TextSplits:
    """Returns the text of the files in `folder` that are TRAIN and VALID, but for those that have
    no text field, which are left out as well.

    Raises:
        InputError: if none is left to train on, or one cannot be read.
    """
    record, errors = TextRecord(left_out=left_out), []

    def holds_text(file: Path) -> bool:
        if split_name(file.name)[1] in PLAIN_KINDS:
            return True
        try:
            file_text_field(folder / file, config.text_field)
        except NoTextField as error:
            errors.append(error)
            return False
        return True

    train, valid = ([file for file in kinds[kind] if holds_text(file)] for kind in (TRAIN, VALID))
    if not train:
        raise errors[0]
    record.train, record.valid = list(map(str, train)), list(map(str, valid))
    encodings = {str(file): encoding_name(folder / file) for file in train + valid}
    record.encodings = {file: name for file, name in encodings.items() if name != "UTF-8"}
    unread = [file for file in kinds[TRAIN] + kinds[VALID] if file not in train + valid]
    record.left_out = [*left_out, *(f"{file} (no text field)" for file in unread)]

    def read(files: list[Path]) -> Iterator[TextChunk]:
        for file in files:
            if split_name(file.name)[1] in PLAIN_KINDS:
                yield from chunk_stories(read_blocks(folder / file))
            else:
                texts = read_record_texts(folder / file, config.text_field, record.null_rows)
                yield from chunk_texts(texts)

    return TextSplits(lambda: read(train), (lambda: read(valid)) if valid else None, record)


def suggest_name(path: Path) -> str:
    """Returns the name that was probably meant, as the end of a sentence; empty if none is near."""
    names = ["auto", "tinystories", "builtin"]
    if path.parent.is_dir():
        names += [sibling.name for sibling in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" (perhaps {close[0]}?)" if close else ""


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

    A validation split of the source is that, up to `valid_fraction` of the limit. Otherwise whole
    documents are, or the end of the text where those cannot be (see `choose_documents`).
    """

    def read_train() -> Iterator[TextChunk]:
        return take_stories(splits.train(), limit, splits.record)

    if splits.valid is not None:
        valid_limit = round(limit * valid_fraction) or min(limit, 1)
        yield from ((False, chunk) for chunk in read_train())
        valid = take_stories(splits.valid(), valid_limit, splits.record)
        yield from ((True, chunk) for chunk in valid)
        return
    lengths = document_lengths(read_train())
    chosen = choose_documents(lengths, valid_fraction)
    splits.record.splits_document = not chosen
    if chosen:
        yield from mark_documents(read_train(), chosen)
    else:
        yield from mark_end(read_train(), round(sum(lengths) * (1 - valid_fraction)))


def take_stories(
    chunks: Iterator[TextChunk], limit: int, record: TextRecord
) -> Iterator[TextChunk]:
    """Yields the chunks of the first `limit` stories, or of all if `limit` is 0. Notes in `record`
    whether there are more."""
    left = limit
    for chunk in chunks:
        yield chunk
        left -= chunk.ends_story
        if limit and not left:
            break
    record.is_cut |= next(chunks, None) is not None


def document_lengths(chunks: Iterator[TextChunk]) -> list[int]:
    """Returns the characters of each story."""
    lengths, length = [], 0
    for chunk in chunks:
        length += len(chunk.text)
        if chunk.ends_story:
            lengths.append(length)
            length = 0
    return lengths


def mark_documents(
    chunks: Iterator[TextChunk], chosen: set[int]
) -> Iterator[tuple[bool, TextChunk]]:
    """Yields chunks, and True for those of the stories whose numbers are chosen."""
    story = 0
    for chunk in chunks:
        yield story in chosen, chunk
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
