"""Stories from files, in chunks, and which of them are the validation text."""

from itertools import islice

import pytest

from config import DataConfig, InputError
from utils.text import sources
from utils.text.builtin.stories import builtin_stories
from utils.text.sources import (
    SEPARATOR,
    TextChunk,
    TextRecord,
    TextSplits,
    chunk_stories,
    find_source,
    mark_validation,
    spool,
)
from utils.text.tokenizer import learn_tokenizer


def test_chunks_of_a_long_story_make_the_same_tokens_however_it_arrives(monkeypatch):
    text = "\n\n".join(builtin_stories(80))
    monkeypatch.setattr(sources, "CHUNK_CHARS", 1000)
    chunks = list(chunk_stories([text]))
    assert len(chunks) > 20 and [chunk.ends_story for chunk in chunks[-2:]] == [False, True]
    assert "".join(chunk.text for chunk in chunks) == text
    in_blocks = (text[i : i + 77] for i in range(0, len(text), 77))
    assert list(chunk_stories(in_blocks)) == chunks

    tokenizer = learn_tokenizer(iter([text]), 400)
    ids = [i for chunk in chunks for i in tokenizer.encode(chunk.text).ids]
    assert ids == tokenizer.encode(text).ids


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_stories_lose_the_white_space_around_them_and_blank_ones_are_left_out(size):
    text = f" \n{SEPARATOR}\none {SEPARATOR}{SEPARATOR} two\n\nlines\n{SEPARATOR} \n"
    blocks = (text[i : i + size] for i in range(0, len(text), size))
    assert list(chunk_stories(blocks)) == [TextChunk("one"), TextChunk("two\n\nlines")]


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("count", [1, 19, 40, 300])
def test_every_story_is_either_trained_on_or_validated_on(count, fraction):
    texts = [f"story {i} of {count}" for i in range(count)]
    splits = TextSplits(lambda: map(TextChunk, texts), None, TextRecord())
    marked = list(mark_validation(splits, 0, fraction))
    parts = {is_valid: [c.text for v, c in marked if v == is_valid] for is_valid in (True, False)}
    letters = "".join(chunk.text for _, chunk in marked).replace(" ", "")
    assert letters == "".join(texts).replace(" ", "")
    assert parts[False]
    if count > 1:
        assert parts[True] and set(parts[True]).isdisjoint(parts[False])
        assert set(parts[True] + parts[False]) == set(texts), "each story is whole"
        share = sum(map(len, parts[True])) / sum(map(len, texts))
        assert abs(share - fraction) < max(0.02, 1 / count)


def test_a_folder_of_validation_text_only_is_refused(tmp_path):
    for name in ("valid.txt", "test.txt"):
        (tmp_path / name).write_text("text")
    with pytest.raises(InputError, match=r"all its files are .*\(test\.txt, valid\.txt\)"):
        find_source(DataConfig(str(tmp_path)))
    source = find_source(DataConfig(str(tmp_path / "valid.txt")))
    assert list(source.get_splits().train()) == [TextChunk("text")], (
        "named itself, it is trained on"
    )


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "notes.pdf").write_text("text")
    with pytest.raises(InputError, match=r"the folder holds no \.txt"):
        find_source(DataConfig(str(tmp_path)))
    (tmp_path / "titles.json").write_text('{"titles": ["a", "b"]}')
    with pytest.raises(InputError, match=r"titles\.json has no field of text"):
        find_source(DataConfig(str(tmp_path))).get_splits()


def test_a_spool_takes_each_text_once_however_often_and_far_it_is_read():
    texts = [f"line {i}\n\u2028é" for i in range(9)]
    taken = []
    reread = spool(text for text in texts if not taken.append(text))
    assert list(islice(reread(), 4)) == texts[:4]
    assert list(reread()) == list(reread()) == texts == taken
