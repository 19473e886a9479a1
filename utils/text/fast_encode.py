"""Texts to token ids, the same as the tokenizers library gives, which is asked once for each word.

GPT-2's byte-level BPE encodes each word by itself, so the ids of a word that has come before can
be looked up. `write_tokens` writes the ids of a whole corpus.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm

from utils.text.sources import TextChunk
from utils.text.special_tokens import start_ids

MAX_CACHED_CHARS = 1 << 21
"""Characters of words whose ids are held for looking up, about 50 MB."""
BATCH_CHARS = 1 << 20
"""Characters that are encoded at a time."""
SPACE = r"[^\S\x1c-\x1f]"
"""White space to Unicode, and so to the library; to Python four control characters are as well."""
NON_SPACE = r"[\S\x1c-\x1f]"
WORDS = re.compile(rf" ?[A-Za-z]++(?![^\0-\x7f])|{NON_SPACE}+|{SPACE}+{NON_SPACE}*")
"""GPT-2's split always has a border between what is no white space and white space after it, and
between an ASCII letter and ASCII that is no letter. So has this one; it has no border that GPT-2's
lacks, and a word of it may be several of GPT-2's."""

Encode = Callable[[list[str]], list[bytes]]
"""Returns for each text its ids as bytes of a fixed dtype."""


class WrittenText(NamedTuple):
    """What `write_tokens` has written."""

    train_documents: int
    valid_documents: int
    max_id: int
    """The highest id."""


def write_tokens(
    chunks: Iterable[tuple[bool, TextChunk]],
    tokenizer: Tokenizer,
    eos_id: int,
    dtype: np.dtype,
    train: Path,
    valid: Path,
) -> WrittenText:
    """Writes the ids of every story, those that the tokenizer puts in front of a text before each
    and `eos_id` after it, in the order in which they come. Returns what was written.

    Args:
        chunks: Chunks of the stories, and whether they are validation text.
        tokenizer: Encodes them, without adding special tokens.
        eos_id: Id of the end-of-text token.
        dtype: The unsigned integer type of the files.
        train: File for the training tokens.
        valid: File for the validation tokens.
    """
    encode, first = make_encoder(tokenizer, dtype), start_ids(tokenizer)
    start, end = (np.array(ids, dtype).tobytes() for ids in (first, [eos_id]))
    begins_story, counts, highest = True, [0, 0], max([*first, eos_id])
    with train.open("wb") as train_file, valid.open("wb") as valid_file:
        for batch in batch_chunks(show_progress(chunks)):
            encoded = encode([chunk.text for _, chunk in batch])
            for (is_valid, chunk), ids in zip(batch, encoded, strict=True):
                file = valid_file if is_valid else train_file
                file.write(start * begins_story + ids + end * chunk.ends_story)
                begins_story = chunk.ends_story
                counts[is_valid] += chunk.ends_story
            highest = max(highest, np.frombuffer(b"".join(encoded), dtype).max(initial=0).item())
    return WrittenText(counts[False], counts[True], highest)


def show_progress(chunks: Iterable[tuple[bool, TextChunk]]) -> Iterator[tuple[bool, TextChunk]]:
    """Yields the chunks, and counts their characters on a progress bar."""
    bar_format = "{desc} {n:,} characters, {elapsed}"
    with tqdm(desc="tokenizing", bar_format=bar_format, disable=None) as bar:
        for is_valid, chunk in chunks:
            yield is_valid, chunk
            bar.update(len(chunk.text))


def batch_chunks(
    chunks: Iterable[tuple[bool, TextChunk]],
) -> Iterator[list[tuple[bool, TextChunk]]]:
    """Yields the chunks in lists of BATCH_CHARS characters or a little more; the last has less."""
    batch, length = [], 0
    for is_valid, chunk in chunks:
        batch.append((is_valid, chunk))
        length += len(chunk.text)
        if length >= BATCH_CHARS:
            yield batch
            batch, length = [], 0
    yield batch


def make_encoder(tokenizer: Tokenizer, dtype: np.dtype) -> Encode:
    """Returns a function that encodes texts as `tokenizer` does, the fastest that can be used."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

    def encode(texts: list[str]) -> list[bytes]:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype).tobytes() for encoding in encodings]

    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    return cache_words(encode, added) if encodes_words_alone(tokenizer) else encode


def encodes_words_alone(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer encodes each word of GPT-2's split by itself, and always in one way."""
    split, model = tokenizer.pre_tokenizer, tokenizer.model
    return (
        tokenizer.normalizer is None
        and isinstance(split, pre_tokenizers.ByteLevel)
        and split.use_regex
        and not split.add_prefix_space
        and isinstance(model, models.BPE)
        and not model.dropout
    )


def cache_words(encode: Encode, added_tokens: list[str]) -> Encode:
    """Returns a function that encodes like `encode`, but looks up the words that have come before.
    A text with an added token counts as one word, since such a token may reach beyond a word."""
    cached: dict[str, bytes] = {}
    cached_chars = 0

    def split(text: str) -> list[str]:
        if any(token in text for token in added_tokens):
            return [text]
        return WORDS.findall(text)

    def encode_cached(texts: list[str]) -> list[bytes]:
        nonlocal cached_chars
        if cached_chars > MAX_CACHED_CHARS:
            cached.clear()
            cached_chars = 0
        words = [split(text) for text in texts]
        new = list(set(chain.from_iterable(words)).difference(cached))
        cached.update(zip(new, encode(new), strict=True))
        cached_chars += sum(map(len, new))
        return [b"".join(map(cached.__getitem__, row)) for row in words]

    return encode_cached
