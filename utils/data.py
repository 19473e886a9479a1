"""The corpus: a text becomes files of tokens once, and batches are read from these files.

corpus = prepare_corpus(DataConfig("builtin"), vocab_size=0)
windows = get_batch(corpus.train, seq_len=256, size=8, seed=0, index=0)   # (8, 257) int64
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from config import DataConfig, require
from utils.runtime.hub import HubUnreachable, hash_file
from utils.text.fast_encode import write_tokens
from utils.text.sources import TextChunk, TextSource, find_source, mark_validation
from utils.text.special_tokens import SpecialTokens
from utils.text.token_cache import cached_folder
from utils.text.tokenizer import (
    TOKENIZER_JSON,
    embedding_rows,
    load_tokenizer,
    resolve_tokenizer_name,
    tokenizer_identity,
)

CACHE_FORMAT = 4
"""Part of every cache key. It goes up when the same text would become other files."""
TRAIN_FILE, VALID_FILE, META_FILE = "train.bin", "valid.bin", "meta.json"


@dataclass(frozen=True, eq=False)
class Corpus:
    """The tokens of all stories, an end-of-text token after each, and before it what the tokenizer
    puts in front of a text, in memory-mapped files."""

    train: np.ndarray
    """Training tokens (N,), uint16 or, for a large vocabulary, uint32."""
    valid: np.ndarray
    """Validation tokens (N,)."""
    tokenizer: Tokenizer
    special_tokens: SpecialTokens
    vocab_size: int
    """Rows that an embedding of the tokens needs."""
    name: str
    """`data.source`; for `auto`, the source that it came to be."""
    is_fallback: bool
    """Whether `auto` had to take the built-in stories."""
    fingerprint: str
    """Hash of all tokens: equal tokens, equal fingerprint."""


def prepare_corpus(
    config: DataConfig, vocab_size: int, warn: Callable[[str], None] = print
) -> Corpus:
    """Returns the tokens of `data.source`, from the cache or, the first time, made of its text.

    Args:
        config: Where the text comes from and how it becomes tokens.
        vocab_size: How many tokens the model has room for, which is also how many a learned
            tokenizer learns. 0 takes as many as there are.
        warn: Takes lines of text about what is not as asked for.

    Raises:
        InputError: naming the field, for a source, tokenizer or cache that cannot be used.
    """
    if config.source != "auto":
        return prepare_source(config, vocab_size, warn)
    try:
        return prepare_source(replace(config, source="tinystories"), vocab_size, warn)
    except HubUnreachable as error:
        warn(f"WARNING: no TinyStories. {error}")
        warn("Going on with the BUILT-IN stories; --data.source takes a text file or folder.")
    corpus = prepare_source(replace(config, source="builtin"), vocab_size, warn)
    return replace(corpus, is_fallback=True)


def prepare_source(config: DataConfig, vocab_size: int, warn: Callable[[str], None]) -> Corpus:
    """Returns the corpus of a source other than `auto`. See `prepare_corpus`."""
    source = find_source(config)
    tokenizer_name = resolve_tokenizer_name(config)
    identity = [
        CACHE_FORMAT,
        source.identity,
        tokenizer_identity(tokenizer_name, vocab_size),
        config.num_stories,
        config.valid_fraction,
        config.eos_token,
    ]

    def build(folder: Path) -> None:
        tokenize_source(folder, config, source, tokenizer_name, vocab_size)
        is_same = find_source(config).identity == source.identity
        require(is_same, f"data.source = {config.source} changed while it was read; run again")

    corpus = open_corpus(cached_folder(config.cache, identity, build, warn), config.source)
    check_vocab_size(config, corpus.vocab_size, vocab_size)
    return corpus


def check_vocab_size(config: DataConfig, size: int, vocab_size: int) -> None:
    """Raises InputError if a tokenizer of `size` tokens is too large for the model."""
    require(
        not vocab_size or size <= vocab_size,
        f"data.tokenizer = {config.tokenizer} has {size} tokens, "
        f"more than model.vocab_size = {vocab_size} has room for",
    )


def tokenize_source(
    folder: Path, config: DataConfig, source: TextSource, tokenizer_name: str, vocab_size: int
) -> None:
    """Writes a source's tokens, its tokenizer and what `open_corpus` needs to know into a folder.

    Raises:
        InputError: if the source holds no text, or the tokenizer is too large for the model.
    """
    splits = source.get_splits()

    def read_chunks() -> Iterator[tuple[bool, TextChunk]]:
        return mark_validation(splits, config.num_stories, config.valid_fraction)

    def read_train_text() -> Iterator[str]:
        return (chunk.text for is_valid, chunk in read_chunks() if not is_valid)

    tokenizer, special_tokens = load_tokenizer(
        tokenizer_name, vocab_size, read_train_text, config.eos_token
    )
    size = embedding_rows(tokenizer)
    check_vocab_size(config, size, vocab_size)
    (folder / TOKENIZER_JSON).write_text(tokenizer.to_str(), encoding="utf-8")
    dtype = np.dtype(np.uint16 if size <= 2**16 else np.uint32)
    train, valid = folder / TRAIN_FILE, folder / VALID_FILE
    write_tokens(read_chunks(), tokenizer, special_tokens.eos_id, dtype, train, valid)
    require(train.stat().st_size > 0, f"data.source = {config.source}: there is no text in it")
    hashes = hash_file(train) + hash_file(valid)
    meta = {
        "special_tokens": asdict(special_tokens),
        "vocab_size": size,
        "dtype": dtype.name,
        "fingerprint": hashlib.sha256(bytes.fromhex(hashes)).hexdigest()[:16],
    }
    (folder / META_FILE).write_text(json.dumps(meta))


def open_corpus(folder: Path, name: str) -> Corpus:
    """Returns the corpus that `tokenize_source` wrote, without reading its tokens."""
    meta = json.loads((folder / META_FILE).read_text())
    dtype, special = meta.pop("dtype"), meta.pop("special_tokens")
    special["stop_ids"] = tuple(special["stop_ids"])
    return Corpus(
        train=map_tokens(folder / TRAIN_FILE, dtype),
        valid=map_tokens(folder / VALID_FILE, dtype),
        tokenizer=Tokenizer.from_file(str(folder / TOKENIZER_JSON)),
        special_tokens=SpecialTokens(**special),
        name=name,
        is_fallback=False,
        **meta,
    )


def map_tokens(path: Path, dtype: str) -> np.ndarray:
    """Returns a file's tokens, memory-mapped unless it is empty, which cannot be mapped."""
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def check_corpus_length(corpus: Corpus, seq_len: int) -> None:
    """Raises InputError unless each split holds a context of `seq_len` tokens and one more."""
    for split, tokens in (("training", corpus.train), ("validation", corpus.valid)):
        require(
            len(tokens) > seq_len,
            f"data.source = {corpus.name}: the {split} text has {len(tokens)} tokens, shorter "
            f"than one context (model.seq_len = {seq_len} + 1)",
        )


def get_batch(tokens: np.ndarray, seq_len: int, size: int, seed: int, index: int) -> Tensor:
    """Returns batch `index` of a run: random windows (size, seq_len + 1) of its tokens, int64.

    The windows follow from (seed, index) alone. Inputs are all but the last column, targets all
    but the first.
    """
    generator = np.random.default_rng((seed % 2**64, index))
    offsets = generator.integers(len(tokens) - seq_len, size=size)
    return torch.from_numpy(tokens[offsets[:, None] + np.arange(seq_len + 1)].astype(np.int64))


def first_windows(tokens: np.ndarray, seq_len: int, limit_tokens: int) -> Tensor:
    """Returns the windows (N, seq_len + 1), int64, at the start of a text: as many as lie side by
    side within `limit_tokens`, at least one."""
    count = max(1, min(limit_tokens, len(tokens)) // (seq_len + 1))
    flat = tokens[: count * (seq_len + 1)].astype(np.int64)
    return torch.from_numpy(flat).view(count, seq_len + 1)
