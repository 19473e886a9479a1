"""Corpus -> tokens on disk -> batches. Text becomes tokens once; a later start maps the files."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from config import DataConfig, require
from utils import cache, hub, sources, tokens

FORMAT = 2
"""Raised when the same text would become other files."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens of the stories, an end-of-text token after each, in memory-mapped files."""

    train: np.ndarray
    valid: np.ndarray
    tokenizer: Tokenizer
    eos: int
    vocab_size: int
    name: str
    """`data.source` as it was given, but for `auto`: what that came to be."""
    fallback: bool
    """`auto` had to make do with the built-in stories."""
    fingerprint: str
    """Of both token files: equal tokens, equal fingerprint."""


def prepare(config: DataConfig, vocab_size: int, say: Callable[[str], None] = print) -> Corpus:
    """`vocab_size` is what the model has room for, and what a learned tokenizer learns; 0: any."""
    if config.source != "auto":
        return prepare_source(config, vocab_size, say)
    try:
        return prepare_source(replace(config, source="tinystories"), vocab_size, say)
    except hub.Unreachable as error:
        say(f"WARNING: no TinyStories. {error}")
        say("Going on with the BUILT-IN stories; --data.source takes a text file or folder.")
    corpus = prepare_source(replace(config, source="builtin"), vocab_size, say)
    return replace(corpus, fallback=True)


def prepare_source(config: DataConfig, vocab_size: int, say: Callable[[str], None]) -> Corpus:
    source = sources.find(config)
    name = tokens.resolve(config)
    identity = [
        FORMAT,
        source.identity,
        tokens.identity(name, vocab_size),
        config.num_stories,
        config.holdout,
    ]

    def fill(part: Path) -> None:
        build(part, config, source, name, vocab_size)
        same = sources.find(config).identity == source.identity
        require(same, f"data.source = {config.source} changed while it was read; run again")

    folder = cache.folder(config.cache, identity, fill, say)
    corpus = open_corpus(folder, config.source)
    check_room(config, corpus.vocab_size, vocab_size)
    return corpus


def check_room(config: DataConfig, size: int, vocab_size: int) -> None:
    require(
        not vocab_size or size <= vocab_size,
        f"data.tokenizer = {config.tokenizer} has {size} tokens, "
        f"more than model.vocab_size = {vocab_size} has room for",
    )


def build(
    folder: Path, config: DataConfig, source: sources.Source, name: str, vocab_size: int
) -> None:
    splits = source.open()

    def pieces() -> Iterator[tuple[bool, sources.Piece]]:
        return sources.held_out(splits, config.num_stories, config.holdout)

    def text() -> Iterator[str]:
        return (piece.text for held_out, piece in pieces() if not held_out)

    tokenizer, eos = tokens.load(name, vocab_size, text)
    size = tokens.size(tokenizer)
    check_room(config, size, vocab_size)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    dtype = np.dtype(np.uint16 if size <= 2**16 else np.uint32)
    train, valid = folder / "train.bin", folder / "valid.bin"
    tokens.write(pieces(), tokenizer, eos, dtype, train, valid)
    require(train.stat().st_size > 0, f"data.source = {config.source}: there is no text in it")
    meta = {
        "eos": eos,
        "vocab_size": size,
        "dtype": dtype.name,
        "fingerprint": fingerprint(train, valid),
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def fingerprint(*files: Path) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def open_corpus(folder: Path, name: str) -> Corpus:
    meta = json.loads((folder / "meta.json").read_text())
    train, valid = (mapped(folder / file, meta["dtype"]) for file in ("train.bin", "valid.bin"))
    return Corpus(
        train=train,
        valid=valid,
        tokenizer=Tokenizer.from_file(str(folder / "tokenizer.json")),
        eos=meta["eos"],
        vocab_size=meta["vocab_size"],
        name=name,
        fallback=False,
        fingerprint=meta["fingerprint"],
    )


def mapped(path: Path, dtype: str) -> np.ndarray:
    """An empty file cannot be mapped."""
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def check_length(corpus: Corpus, seq_len: int) -> None:
    """Each split must hold at least one context and the token after it."""
    for what, split in (("training", corpus.train), ("held-out", corpus.valid)):
        require(
            len(split) > seq_len,
            f"data.source = {corpus.name}: the {what} text has {len(split)} tokens, shorter than "
            f"one context (model.seq_len = {seq_len} + 1)",
        )


def batch(tokens: np.ndarray, seq_len: int, size: int, seed: int, index: int) -> torch.Tensor:
    """Batch `index`, (size, seq_len + 1): windows at offsets that follow from (seed, index) alone.

    Inputs are all but the last column, targets all but the first.
    """
    offsets = np.random.default_rng((seed % 2**64, index)).integers(
        len(tokens) - seq_len, size=size
    )
    return torch.from_numpy(tokens[offsets[:, None] + np.arange(seq_len + 1)].astype(np.int64))


def windows(tokens: np.ndarray, seq_len: int, limit_tokens: int) -> torch.Tensor:
    """The first windows (n, seq_len + 1) of the text, side by side: the same at every call."""
    count = max(1, min(limit_tokens, len(tokens)) // (seq_len + 1))
    flat = tokens[: count * (seq_len + 1)].astype(np.int64)
    return torch.from_numpy(flat).view(count, seq_len + 1)
