"""Ids are those that the tokenizers library gives for the whole text, whichever way they come."""

import random
import sys
import tracemalloc
from io import StringIO

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from utils.text import fast_encode
from utils.text.builtin.stories import builtin_stories
from utils.text.fast_encode import (
    WORDS,
    cache_words,
    encodes_words_alone,
    make_encoder,
    show_progress,
    write_tokens,
)
from utils.text.sources import SEPARATOR, TextChunk
from utils.text.tokenizer import learn_tokenizer

DTYPE = np.dtype(np.uint16)
ADDED = [
    AddedToken("<end>", lstrip=True),
    AddedToken("<mask>", rstrip=True, special=True),
    AddedToken("cat", single_word=True),
    AddedToken("two words"),
    AddedToken("  "),
]
SPACES = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\x0b", "\x1c", "\x85", "\xa0", "\u2028", "\u3000"]
MARKS = ["'", "'s", "n't", "'LL", "\u2019s", ".", "...", '"', "\u201c", "_", "\0", "\x7f", "\ufeff"]
OTHERS = ["\u00e9", "e\u0301", "\u4e2d\u6587", "\u0663", "\u00b2", "1", "2024", "\U0001f600"]
OTHERS += ["\u200d", "\U0001f469\u200d\U0001f680", "\U0010ffff", "\ud7ff", "\u017f", "\u212a"]
TEXTS = st.lists(
    st.sampled_from([*SPACES, *MARKS, *OTHERS, *(token.content for token in ADDED), SEPARATOR])
    | st.sampled_from(["a", "Z", "cat", "two", "words", "the", "end", "Once", "s", "t"])
    | st.characters(exclude_categories=["Cs"]),
    max_size=12,
).map("".join)


def make_tokenizer(added=()) -> Tokenizer:
    text = iter([" ".join(SPACES + MARKS + OTHERS), *builtin_stories(60)])
    tokenizer = learn_tokenizer(text, 700)
    tokenizer.add_tokens(list(added))
    return tokenizer


def changed_tokenizer(**parts) -> Tokenizer:
    tokenizer = make_tokenizer()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


BYTES = pre_tokenizers.ByteLevel
WORD_BASED = {"learned": make_tokenizer(), "with added tokens": make_tokenizer(ADDED)}
NOT_WORD_BASED = {
    "a normalizer": changed_tokenizer(normalizer=normalizers.NFKC()),
    "a space before each text": changed_tokenizer(pre_tokenizer=BYTES(add_prefix_space=True)),
    "no split": changed_tokenizer(pre_tokenizer=BYTES(add_prefix_space=False, use_regex=False)),
    "another split": changed_tokenizer(pre_tokenizer=pre_tokenizers.Whitespace()),
    "no pre-tokenizer": changed_tokenizer(pre_tokenizer=None),
    "no merges": changed_tokenizer(model=models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")),
}
ENCODERS = {
    name: (tokenizer, make_encoder(tokenizer, DTYPE))
    for name, tokenizer in (WORD_BASED | NOT_WORD_BASED).items()
}


def encode_by_library(tokenizer, texts):
    ids = (tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
    return [np.array(row, DTYPE).tobytes() for row in ids]


@pytest.mark.parametrize("tokenizer, encode", ENCODERS.values(), ids=ENCODERS)
@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4))
@example([""])
@example(
    ["", " ", "\n", "a", "a ", " a", "a  b", "a \n b", "caf\u00e9", "cafe\u0301s", " caf\u00e9"]
)
@example(["a<end>", "a <end> b", "a<mask>  b", "scat cat", "two  words two words", SEPARATOR * 2])
def test_ids_are_those_of_the_library(tokenizer, encode, texts):
    assert encode(texts) == encode_by_library(tokenizer, texts)


def test_words_are_looked_up_only_for_tokenizers_that_encode_each_by_itself():
    assert all(map(encodes_words_alone, WORD_BASED.values()))
    assert not any(map(encodes_words_alone, NOT_WORD_BASED.values()))
    assert not encodes_words_alone(changed_tokenizer(model=models.BPE(dropout=0.1)))


def test_the_split_has_no_border_that_gpt2s_lacks_whatever_the_character():
    characters = map(chr, (*range(0xD800), *range(0xE000, 0x10000), *range(0x1F300, 0x1FB00)))
    text = "".join(f"{c}a{c} .{c}" for c in characters)
    split = BYTES(add_prefix_space=False).pre_tokenize_str(text)
    words = list(WORDS.finditer(text))
    assert "".join(word.group() for word in words) == text
    assert {word.end() for word in words} <= {end for _, (_, end) in split}


def test_a_text_that_is_no_unicode_is_refused_as_the_library_does():
    with pytest.raises(Exception) as theirs:
        WORD_BASED["learned"].encode("a \ud800 b")
    with pytest.raises(type(theirs.value)):
        ENCODERS["learned"][1](["a \ud800 b"])


def test_a_word_that_has_come_before_needs_no_encoding():
    def encode_once(texts):
        assert not known.intersection(texts)
        known.update(texts)
        return [text.upper().encode() for text in texts]

    known = set()
    encode = cache_words(encode_once, ["<end>"])
    assert encode(["one two two", "two", "two<end>"]) == [b"ONE TWO TWO", b"TWO", b"TWO<END>"]
    assert encode([" two two three"]) == [b" TWO TWO THREE"]
    assert known == {"one", " two", "two", "two<end>", " three"}


def test_every_story_begins_and_ends_with_its_token_and_a_part_of_one_does_not(tmp_path):
    tokenizer = changed_tokenizer(
        post_processor=TemplateProcessing("<end> $A", special_tokens=[("<end>", 7)])
    )
    parts = [(False, "a b", False), (False, " c", True), (True, "d", True), (False, "e", True)]
    chunks = [(is_valid, TextChunk(text, ends_story)) for is_valid, text, ends_story in parts]
    train, valid = tmp_path / "train.bin", tmp_path / "valid.bin"
    write_tokens(chunks, tokenizer, 9, DTYPE, train, valid)

    def ids(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    expected = [7, *ids("a b"), *ids(" c"), 9, 7, *ids("e"), 9]
    assert np.fromfile(train, DTYPE).tolist() == expected
    assert np.fromfile(valid, DTYPE).tolist() == [7, *ids("d"), 9]


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(fast_encode, "MAX_CACHED_CHARS", 20_000)
    monkeypatch.setattr(fast_encode, "BATCH_CHARS", 10_000)
    rng = random.Random(0)

    def peak_bytes(count):
        """Writes texts that never use a word again, some of which are one long word."""
        long = ((i % 40 == 0) * "\u4e2d" * 5_000 for i in range(count))
        texts = (f"{part} {rng.random()} x{i}." for i, part in enumerate(long))
        chunks = ((False, TextChunk(text)) for text in texts)
        files = tmp_path / "train.bin", tmp_path / "valid.bin"
        tracemalloc.start()
        write_tokens(chunks, WORD_BASED["learned"], 0, DTYPE, *files)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_bytes(100)
    assert peak_bytes(8_000) < 1.3 * peak_bytes(2_000)


def test_the_characters_that_are_tokenized_are_counted_in_whole_numbers(monkeypatch):
    terminal = type("Terminal", (StringIO,), {"isatty": lambda self: True})()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert len([*show_progress((False, TextChunk("A story.")) for _ in range(1234))]) == 1234
    counts = [line.split()[1] for line in terminal.getvalue().split("\r") if line.strip()]
    assert counts[0] == "0" and counts[-1] == "9,872"
