"""Bits per byte: a loss that can be compared between vocabularies, as it counts no tokens."""

from itertools import groupby
from math import log

import numpy as np
from tokenizers import Tokenizer, decoders

LOST_BYTE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer with byte fallback decodes each byte to that is no part of a whole character."""


def bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float | None:
    """Returns what a loss is in bits per byte of UTF-8; None for a text without bytes.

    Args:
        loss: The mean loss in nats per token, that of the ends of texts included.
        tokens: How many tokens it is the mean of.
        text_bytes: How many bytes these tokens stand for (`count_target_bytes`).
    """
    return loss / log(2) * tokens / text_bytes if text_bytes else None


def count_target_bytes(windows: np.ndarray, tokenizer: Tokenizer, eos_id: int) -> int:
    """Returns how many bytes of UTF-8 the targets of some windows stand for, exactly.

    Special tokens and the end of a text stand for none. The text is the one that the tokenizer
    decodes: if it changes what it reads, to lower case for instance, that is not the text that was
    read.

    Args:
        windows: Tokens (N, T + 1); all but the first of each window are targets.
        tokenizer: The tokenizer that they are from.
        eos_id: Id of the end-of-text token.
    """
    added = tokenizer.get_added_tokens_decoder()
    silent_ids = {eos_id, *(token for token, content in added.items() if content.special)}
    if isinstance(tokenizer.decoder, decoders.ByteLevel):
        # A token may be a part of a character, which cannot be decoded. But each letter of its name
        # is a byte, unless it was added as a text.
        ids, counts = np.unique(windows[:, 1:], return_counts=True)
        names = [
            added[i].content.encode() if i in added else tokenizer.id_to_token(i) or ""
            for i in ids.tolist()
        ]
        lengths = np.where(np.isin(ids, list(silent_ids)), 0, list(map(len, names)))
        return int(counts @ lengths)
    return sum(count_decoded_bytes(window, tokenizer, silent_ids) for window in windows.tolist())


def count_decoded_bytes(window: list[int], tokenizer: Tokenizer, silent_ids: set[int]) -> int:
    """Returns how many bytes the tokens of a window but the first are decoded to, where
    `silent_ids` stand for none."""

    def count_bytes(ids: list[int]) -> int:
        text = tokenizer.decode(ids, skip_special_tokens=False)
        return len(text.encode()) - (len(LOST_BYTE.encode()) - 1) * text.count(LOST_BYTE)

    # The first token tells whether a space after it is one of the text.
    parts = groupby(window, silent_ids.__contains__)
    total = sum(count_bytes(list(part)) for is_silent, part in parts if not is_silent)
    return total - (count_bytes(window[:1]) if window[0] not in silent_ids else 0)
