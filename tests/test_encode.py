"""Ids are those that the tokenizers library gives for the whole text, whichever way they come."""

import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from utils import encode, stories, tokens
from utils.encode import WORDS, encoder, encodes_parts
from utils.sources import SEPARATOR, Piece

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


def learned(added=()) -> Tokenizer:
    tokenizer = tokens.learn(iter([" ".join(SPACES + MARKS + OTHERS), *stories.stories(60)]), 700)
    tokenizer.add_tokens(list(added))
    return tokenizer


def changed(**parts) -> Tokenizer:
    tokenizer = learned()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


BY_WORDS = {"learned": learned(), "with added tokens": learned(ADDED)}
BYTES = pre_tokenizers.ByteLevel
WHOLE = {
    "a normalizer": changed(normalizer=normalizers.NFKC()),
    "a space before each text": changed(pre_tokenizer=BYTES(add_prefix_space=True)),
    "no split": changed(pre_tokenizer=BYTES(add_prefix_space=False, use_regex=False)),
    "another split": changed(pre_tokenizer=pre_tokenizers.Whitespace()),
    "none": changed(pre_tokenizer=None),
    "no merges": changed(model=models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")),
}
ENCODERS = {name: (it, encoder(it, DTYPE)) for name, it in (BY_WORDS | WHOLE).items()}


def by_library(tokenizer, texts):
    """One at a time, with nothing kept."""
    ids = (tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
    return [np.array(each, DTYPE).tobytes() for each in ids]


@pytest.mark.parametrize("tokenizer, ours", ENCODERS.values(), ids=ENCODERS)
@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4))
@example([""])
@example(
    ["", " ", "\n", "a", "a ", " a", "a  b", "a \n b", "caf\u00e9", "cafe\u0301s", " caf\u00e9"]
)
@example(["a<end>", "a <end> b", "a<mask>  b", "scat cat", "two  words two words", SEPARATOR * 2])
def test_ids_are_the_librarys(tokenizer, ours, texts):
    assert ours(texts) == by_library(tokenizer, texts)


def test_only_tokenizers_that_look_at_no_more_than_a_part_are_asked_for_words():
    assert all(map(encodes_parts, BY_WORDS.values()))
    assert not any(map(encodes_parts, WHOLE.values()))
    assert not encodes_parts(changed(model=models.BPE(dropout=0.1)))


def test_the_split_has_a_border_wherever_words_have_one_whatever_the_character():
    characters = map(chr, (*range(0xD800), *range(0xE000, 0x10000), *range(0x1F300, 0x1FB00)))
    text = "".join(f"{c}a{c} .{c}" for c in characters)
    split = BYTES(add_prefix_space=False).pre_tokenize_str(text)
    words = list(WORDS.finditer(text))
    assert "".join(word.group() for word in words) == text
    assert {word.end() for word in words} <= {end for _, (_, end) in split}


def test_a_text_that_is_no_unicode_is_refused_as_the_library_does():
    with pytest.raises(Exception) as theirs:
        BY_WORDS["learned"].encode("a \ud800 b")
    with pytest.raises(type(theirs.value)):
        ENCODERS["learned"][1](["a \ud800 b"])


def test_a_word_is_asked_for_once(monkeypatch):
    asked = []
    ours = encode.by_words(lambda texts: asked.extend(texts) or [b"." for _ in texts], ["<end>"])
    assert ours(["one two two", "two", "two<end>"]) == [b"...", b".", b"."]
    assert ours([" two two three"]) == [b"..."]
    assert sorted(asked) == sorted(["one", " two", "two", "two<end>", " three"])


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "KEPT", 20_000)
    monkeypatch.setattr(tokens, "BATCH", 10_000)
    chance = random.Random(0)

    def peak(count):
        """Of texts that never use a word again, and of some that are one long word."""
        long = ((i % 40 == 0) * "\u4e2d" * 5_000 for i in range(count))
        texts = (f"{part} {chance.random()} x{i}." for i, part in enumerate(long))
        pieces = ((False, Piece(text)) for text in texts)
        files = tmp_path / "train.bin", tmp_path / "valid.bin"
        tracemalloc.start()
        tokens.write(pieces, BY_WORDS["learned"], 0, DTYPE, *files)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(100)
    assert peak(8_000) < 1.3 * peak(2_000)
