"""The corpus: a text becomes files of tokens once, and batches are read from these files.

corpus = prepare_corpus(DataConfig("builtin"), vocab_size=0)
windows = get_batch(corpus.train, seq_len=256, size=8, seed=0, index=0)   # (8, 257) int64
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from config import DataConfig, require
from utils.runtime.hub import HubUnreachable, hash_file
from utils.text.bits_per_byte import bits_per_byte, count_target_bytes
from utils.text.fast_encode import write_tokens
from utils.text.sources import (
    TextChunk,
    TextRecord,
    TextSource,
    find_source,
    mark_validation,
)
from utils.text.special_tokens import SpecialTokens
from utils.text.token_cache import cached_folder
from utils.text.tokenizer import (
    TOKENIZER_JSON,
    TokenizerUnreachable,
    check_token_ids,
    embedding_rows,
    load_tokenizer,
    resolve_tokenizer_name,
    tokenizer_identity,
    wanted_vocab_size,
)

CACHE_FORMAT = 5
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
    """Rows that an embedding of all the tokenizer's tokens needs."""
    max_id: int
    """The highest id among the tokens."""
    name: str
    """`data.source`; for `auto`, the source that it came to be."""
    is_fallback: bool
    """Whether `auto` had to take the built-in stories."""
    tokenizer_name: str
    """`data.tokenizer`; for `auto`, the tokenizer that it came to be."""
    has_fallback_tokenizer: bool
    """Whether `auto` had to learn a vocabulary because GPT-2's was not to be had."""
    fingerprint: str
    """Hash of all tokens: equal tokens, equal fingerprint."""
    train_documents: int
    """Stories in `train`."""
    valid_documents: int
    """Stories in `valid`."""
    record: TextRecord
    """What the text is made of, and what of it is missing."""


def prepare_corpus(
    config: DataConfig, vocab_size: int, warn: Callable[[str], None] = print
) -> Corpus:
    """Returns the tokens of `data.source`, from the cache or, the first time, made of its text.

    Args:
        config: Where the text comes from and how it becomes tokens.
        vocab_size: How many tokens the model has room for, which is also how many a learned
            tokenizer learns (see `wanted_vocab_size`). 0 takes as many as there are.
        warn: Takes lines of text about what is not as asked for.

    Raises:
        InputError: naming the field, for a source, tokenizer or cache that cannot be used.
    """
    if config.source != "auto":
        return prepare_with_any_tokenizer(config, vocab_size, warn)
    try:
        return prepare_with_any_tokenizer(replace(config, source="tinystories"), vocab_size, warn)
    except TokenizerUnreachable:
        raise
    except HubUnreachable as error:
        warn(f"WARNING: no TinyStories. {error}")
        warn("Going on with the BUILT-IN stories; --data.source takes a text file or folder.")
    builtin = replace(config, source="builtin", config="", split="", valid_split="")
    corpus = prepare_source(builtin, vocab_size, warn)
    return replace(corpus, is_fallback=True)


def prepare_with_any_tokenizer(
    config: DataConfig, vocab_size: int, warn: Callable[[str], None]
) -> Corpus:
    """Returns the corpus of a source other than `auto`, with a learned vocabulary where
    `data.tokenizer` leaves the choice and GPT-2's does not come. See `prepare_corpus`."""
    try:
        return prepare_source(config, vocab_size, warn)
    except TokenizerUnreachable as error:
        if config.tokenizer != "auto":
            raise
        warn(f"WARNING: no tokenizer of GPT-2. {error}")
        warn("Going on with a LEARNED vocabulary; --data.tokenizer takes a tokenizer.json.")
    corpus = prepare_source(replace(config, tokenizer="learned"), vocab_size, warn)
    return replace(corpus, has_fallback_tokenizer=True)


def prepare_source(config: DataConfig, vocab_size: int, warn: Callable[[str], None]) -> Corpus:
    """Returns the corpus of a source other than `auto`. See `prepare_corpus`."""
    source = find_source(config)
    tokenizer_name = resolve_tokenizer_name(config)
    vocab_size = wanted_vocab_size(tokenizer_name, vocab_size)
    identity = [
        CACHE_FORMAT,
        source.identity,
        tokenizer_identity(tokenizer_name, vocab_size),
        source.limit,
        config.valid_fraction,
        config.eos_token,
    ]

    def build(folder: Path) -> None:
        tokenize_source(folder, config, source, tokenizer_name, vocab_size)
        is_same = find_source(config).identity == source.identity
        require(is_same, f"data.source = {config.source} changed while it was read; run again")

    folder = cached_folder(config.cache, identity, build, warn)
    corpus = open_corpus(folder, config.source, tokenizer_name)
    subject, rows = f"data.source = {config.source}", vocab_size or corpus.vocab_size
    check_token_ids(subject, [corpus.max_id], corpus.tokenizer, rows)
    return corpus


def tokenize_source(
    folder: Path, config: DataConfig, source: TextSource, tokenizer_name: str, vocab_size: int
) -> None:
    """Writes a source's tokens, its tokenizer and what `open_corpus` needs to know into a folder.

    Raises:
        InputError: if the source holds no text, or the model has no row for the end of a text.
    """
    splits = source.get_splits()

    def read_chunks() -> Iterator[tuple[bool, TextChunk]]:
        return mark_validation(splits, source.limit, config.valid_fraction)

    def read_train_text() -> Iterator[str]:
        return (chunk.text for is_valid, chunk in read_chunks() if not is_valid)

    tokenizer, special_tokens = load_tokenizer(
        tokenizer_name, vocab_size, read_train_text, config.eos_token
    )
    size = embedding_rows(tokenizer)
    eos_id = special_tokens.eos_id
    check_token_ids(f"data.tokenizer = {tokenizer_name}", [eos_id], tokenizer, vocab_size or size)
    (folder / TOKENIZER_JSON).write_text(tokenizer.to_str(), encoding="utf-8")
    dtype = np.dtype(np.uint16 if size <= 2**16 else np.uint32)
    train, valid = folder / TRAIN_FILE, folder / VALID_FILE
    written = write_tokens(read_chunks(), tokenizer, eos_id, dtype, train, valid)
    require(train.stat().st_size > 0, f"data.source = {config.source}: there is no text in it")
    hashes = hash_file(train) + hash_file(valid)
    meta = {
        "special_tokens": asdict(special_tokens),
        "vocab_size": size,
        "dtype": dtype.name,
        "fingerprint": hashlib.sha256(bytes.fromhex(hashes)).hexdigest()[:16],
        "record": asdict(splits.record),
        **written._asdict(),
    }
    (folder / META_FILE).write_text(json.dumps(meta))


def open_corpus(folder: Path, name: str, tokenizer_name: str) -> Corpus:
    """Returns the corpus that `tokenize_source` wrote, by these names, without reading its
    tokens."""
    meta = json.loads((folder / META_FILE).read_text())
    dtype, record = meta.pop("dtype"), TextRecord(**meta.pop("record"))
    special = meta.pop("special_tokens")
    special["stop_ids"] = tuple(special["stop_ids"])
    vocabulary = (folder / TOKENIZER_JSON).read_text(encoding="utf-8")
    return Corpus(
        train=map_tokens(folder / TRAIN_FILE, dtype),
        valid=map_tokens(folder / VALID_FILE, dtype),
        tokenizer=Tokenizer.from_str(vocabulary),  # from_file takes no path that is not UTF-8
        special_tokens=SpecialTokens(**special),
        name=name,
        is_fallback=False,
        tokenizer_name=tokenizer_name,
        has_fallback_tokenizer=False,
        record=record,
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
    return cut_windows(tokens, generator.integers(len(tokens) - seq_len, size=size), seq_len)


def cut_windows(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> Tensor:
    """Returns the windows (N, seq_len + 1), int64, that begin at `starts`."""
    return torch.from_numpy(tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64))


def spread_starts(length: int, seq_len: int, count: int) -> np.ndarray:
    """Returns where windows of seq_len + 1 tokens begin that are spread evenly over a text of
    `length` tokens, so that each document has its share of them.

    Each lies in the middle of one of `count` equal stretches; there are fewer where so many do not
    fit, but at least one. No token is predicted in two windows.
    """
    last = length - 1
    count = max(1, min(count, last // seq_len))
    twice_the_middles = (2 * np.arange(count) + 1) * last // count
    return (twice_the_middles - seq_len) // 2


def spread_windows(tokens: np.ndarray, seq_len: int, count: int) -> Tensor:
    """Returns the windows (N, seq_len + 1), int64, at `spread_starts`."""
    return cut_windows(tokens, spread_starts(len(tokens), seq_len, count), seq_len)


def count_documents(tokens: np.ndarray, eos_id: int, starts: np.ndarray, seq_len: int) -> int:
    """Returns how many documents the tokens are from that the windows at `starts` predict."""
    ends = np.flatnonzero(tokens == eos_id)
    predicted = starts[:, None] + np.arange(1, seq_len + 1)
    return np.unique(np.searchsorted(ends, predicted)).size


class ValidWindows(NamedTuple):
    """The windows (N, T + 1) of the validation text that a run evaluates, spread evenly over it."""

    regular: Tensor
    """Those of every evaluation."""
    further: Tensor
    """Those that the evaluation at the end of a phase takes as well, from between the others."""
    documents: int
    """How many documents the tokens of `regular` are from."""
    final_documents: int
    """How many documents the tokens of both are from."""
    text_bytes: int
    """How many bytes of text the tokens stand for that every evaluation predicts."""
    final_text_bytes: int
    """How many bytes those stand for that the evaluation at the end of a phase predicts."""

    @property
    def tokens(self) -> int:
        """Tokens that every evaluation predicts."""
        return self.regular[:, 1:].numel()

    @property
    def final_tokens(self) -> int:
        """Tokens that the evaluation at the end of a phase predicts."""
        return self.tokens + self.further[:, 1:].numel()

    def bits_per_byte(self, loss: float) -> float | None:
        """Returns what a loss on the tokens of every evaluation is in bits per byte."""
        return bits_per_byte(loss, self.tokens, self.text_bytes)

    def final_bits_per_byte(self, loss: float) -> float | None:
        """Returns what a loss on the tokens of a phase's end is in bits per byte."""
        return bits_per_byte(loss, self.final_tokens, self.final_text_bytes)


def valid_windows(
    corpus: Corpus, seq_len: int, eval_tokens: int, final_eval_tokens: int
) -> ValidWindows:
    """Returns the windows of about `eval_tokens` tokens for every evaluation, and those that make
    them `final_eval_tokens` at the end of a phase, as far as the validation text has so many."""
    tokens, count = corpus.valid, max(1, eval_tokens // seq_len)
    starts = spread_starts(len(tokens), seq_len, max(count, final_eval_tokens // seq_len))
    count = min(count, len(starts))
    is_regular = np.zeros(len(starts), bool)
    is_regular[(2 * np.arange(count) + 1) * len(starts) // (2 * count)] = True
    regular, further = (
        cut_windows(tokens, starts[chosen], seq_len) for chosen in (is_regular, ~is_regular)
    )
    eos_id = corpus.special_tokens.eos_id
    text_bytes, further_bytes = (
        count_target_bytes(windows.numpy(), corpus.tokenizer, eos_id)
        for windows in (regular, further)
    )
    return ValidWindows(
        regular=regular,
        further=further,
        documents=count_documents(tokens, eos_id, starts[is_regular], seq_len),
        final_documents=count_documents(tokens, eos_id, starts, seq_len),
        text_bytes=text_bytes,
        final_text_bytes=text_bytes + further_bytes,
    )
