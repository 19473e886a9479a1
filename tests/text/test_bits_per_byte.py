"""The bytes that tokens stand for, and the losses that are measured by them."""

from math import log

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from utils.text.bits_per_byte import bits_per_byte, count_target_bytes
from utils.text.builtin.stories import builtin_stories
from utils.text.sources import SEPARATOR
from utils.text.tokenizer import learn_tokenizer

TEXTS = [
    "Once upon a time.",
    " Ein Fuß, 3 €: 猫が🐈‍⬛ a  b\n",
    "été \N{SNOWMAN}",
    *builtin_stories(4),
]
EOS_ID = 0


def byte_level(vocab_size):
    """A byte-level BPE. With few tokens, no character beyond ASCII has one of its own."""
    tokenizer = learn_tokenizer(builtin_stories(40), vocab_size)
    tokenizer.add_tokens(["été", "upon"])
    return tokenizer


def byte_fallback():
    """A tokenizer like Llama's first ones: a space in front of a text that is not the text's, and
    bytes for the characters that have no token."""
    alphabet = [SEPARATOR, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *"▁aceinot", "▁a"])}
    merges = [("▁", "a")]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([SEPARATOR])
    return tokenizer


TOKENIZERS = {
    "byte-level, 300 tokens": lambda: byte_level(300),
    "byte-level, 1000 tokens": lambda: byte_level(1000),
    "byte fallback": byte_fallback,
}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def encode_texts(tokenizer):
    """The tokens of TEXTS after the end of another text."""
    rows = ([*tokenizer.encode(text, add_special_tokens=False).ids, EOS_ID] for text in TEXTS)
    return np.array([EOS_ID, *(token for row in rows for token in row)])


@every_tokenizer
def test_tokens_stand_for_the_bytes_of_their_texts_however_windows_cut_these(tokenizer):
    tokenizer = tokenizer()
    tokens, expected = encode_texts(tokenizer), sum(len(text.encode()) for text in TEXTS)
    for seq_len in (1, 2, 3, 7, len(tokens) - 1):
        starts = range(0, len(tokens) - 1, seq_len)
        windows = [tokens[start : start + seq_len + 1] for start in starts]
        counts = [count_target_bytes(window[None], tokenizer, EOS_ID) for window in windows]
        assert sum(counts) == expected, seq_len
        whole = np.stack([window for window in windows if len(window) == seq_len + 1])
        assert count_target_bytes(whole, tokenizer, EOS_ID) == sum(counts[: len(whole)])


@every_tokenizer
def test_to_guess_bytes_takes_eight_bits_a_byte_in_every_vocabulary(tokenizer):
    tokenizer = tokenizer()
    tokens = encode_texts(tokenizer)[None]
    text_bytes, count = sum(len(text.encode()) for text in TEXTS), tokens.size - 1
    loss = text_bytes * log(256) / count  # in nats per token
    measured = bits_per_byte(loss, count, count_target_bytes(tokens, tokenizer, EOS_ID))
    assert measured == pytest.approx(8)


def test_the_end_of_a_text_alone_has_no_bytes_and_no_bits_per_byte():
    tokens = np.full((1, 4), EOS_ID)
    assert count_target_bytes(tokens, byte_level(300), EOS_ID) == 0
    assert bits_per_byte(3.0, 3, 0) is None
