"""Texts to bytes of token ids: those of the tokenizers library, which is asked once for a word."""

import os
import re
from collections.abc import Callable
from itertools import chain

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

KEPT = 1 << 21
"""Characters of words whose ids are kept: 50 MB or so."""
SPACE = r"[^\S\x1c-\x1f]"
"""White space to Unicode, and so to the library; to Python four control characters are as well."""
REST = r"[\S\x1c-\x1f]"
WORDS = re.compile(rf" ?[A-Za-z]++(?![^\0-\x7f])|{REST}+|{SPACE}+{REST}*")
"""GPT-2's split into parts always parts what is no white space from white space after it, and an
ASCII letter from ASCII that is no letter. So it does here; what lies between may be many parts."""

Encode = Callable[[list[str]], list[bytes]]


def encoder(tokenizer: Tokenizer, dtype: np.dtype) -> Encode:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

    def encode(texts: list[str]) -> list[bytes]:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype).tobytes() for encoding in encodings]

    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    return by_words(encode, added) if encodes_parts(tokenizer) else encode


def encodes_parts(tokenizer: Tokenizer) -> bool:
    """Whether it encodes each part of GPT-2's split by itself, always in the same way."""
    split, model = tokenizer.pre_tokenizer, tokenizer.model
    return (
        tokenizer.normalizer is None
        and isinstance(split, pre_tokenizers.ByteLevel)
        and split.use_regex
        and not split.add_prefix_space
        and isinstance(model, models.BPE)
        and not model.dropout
    )


def by_words(encode: Encode, added: list[str]) -> Encode:
    """The same, but what has come before is looked up: words, and texts with an added token whole,
    as that may reach beyond a word."""
    known: dict[str, bytes] = {}
    kept = 0

    def split(text: str) -> list[str]:
        return [text] if any(token in text for token in added) else WORDS.findall(text)

    def look_up(texts: list[str]) -> list[bytes]:
        nonlocal kept
        if kept > KEPT:
            known.clear()
            kept = 0
        words = [split(text) for text in texts]
        new = list(set(chain.from_iterable(words)).difference(known))
        known.update(zip(new, encode(new), strict=True))
        kept += sum(map(len, new))
        return [b"".join(map(known.__getitem__, row)) for row in words]

    return look_up
