"""Which tokenizer a text gets, and its end-of-text token."""

import random

import pytest

from config import InputError
from utils.text.builtin.stories import builtin_stories
from utils.text.sources import SEPARATOR
from utils.text.tokenizer import (
    LEARN_WORD_BYTES,
    embedding_rows,
    learn_tokenizer,
    load_tokenizer,
    tokenizer_identity,
)


def read_no_text():
    raise AssertionError("nothing is learned")


@pytest.fixture
def folder(tmp_path):
    """A tokenizer whose end-of-text token only its settings name."""
    text = learn_tokenizer(builtin_stories(30), 300).to_str().replace(SEPARATOR, "<end>")
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    return tmp_path


def test_a_learned_tokenizer_reads_back_what_it_has_never_seen():
    tokenizer, special = load_tokenizer("learned", 300, lambda: builtin_stories(30))
    assert embedding_rows(tokenizer) == 300
    assert tokenizer.id_to_token(special.eos_id) == SEPARATOR
    text = " \u00e9\u4e2d\U0001f600 x\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_words_are_cut_to_learn_from_them_and_only_long_ones():
    """The time to learn from a word grows with the square of its length."""
    bases = "".join(random.Random(0).choices("ACGT", k=200)) * 40
    tokenizer = learn_tokenizer(iter([bases]), 2000)
    assert max(map(len, tokenizer.get_vocab())) == LEARN_WORD_BYTES
    assert tokenizer.decode(tokenizer.encode(bases).ids) == bases
    words = str(tokenizer.pre_tokenizer)
    assert words == str(learn_tokenizer(builtin_stories(30), 300).pre_tokenizer)
    assert "FixedLength" not in words, "a text is encoded with its words whole"


def test_a_folders_tokenizer_ends_texts_with_its_own_token(folder):
    tokenizer, special = load_tokenizer(str(folder), 0, read_no_text)
    assert tokenizer.id_to_token(special.eos_id) == "<end>"
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match=r"data.tokenizer = .* has no token that ends a text"):
        load_tokenizer(str(folder), 0, read_no_text)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_another_file_is_another_tokenizer(folder, name):
    before = tokenizer_identity(str(folder), 0)
    assert tokenizer_identity(str(folder), 0) == before
    (folder / name).write_text((folder / name).read_text() + " ")
    assert tokenizer_identity(str(folder), 0) != before


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"model": {"type": "BPE"}}'])
def test_a_damaged_file_is_one_line(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(InputError) as raised:
        load_tokenizer(str(folder), 0, read_no_text)
    message = str(raised.value)
    assert "data.tokenizer" in message and str(folder) in message and "\n" not in message
