"""Corpus -> tokens -> batches."""

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from config import DataConfig, InputError, tiny
from train import batches
from utils import sources, stories, tokens
from utils.data import Corpus, batch, check_length, prepare, windows
from utils.schedule import stages

SEPARATOR = "<|endoftext|>"


@pytest.fixture
def get(tmp_path):
    """A corpus whose tokens are kept under tmp_path."""

    def get(source="builtin", vocab_size=400, tokenizer="learned", **config) -> Corpus:
        config = {"num_stories": 60, "cache": tmp_path / "cache"} | config
        return prepare(DataConfig(str(source), tokenizer, **config), vocab_size)

    return get


def told(corpus: Corpus, split: str) -> list[str]:
    text = corpus.tokenizer.decode(getattr(corpus, split), skip_special_tokens=False)
    *whole, rest = text.split(SEPARATOR)
    assert not rest, "an end of text closes every story"
    return whole


def test_tokens_decode_to_the_stories_and_every_kth_is_held_out(get):
    corpus = get(holdout=0.1)
    texts = list(stories.stories(60))
    assert told(corpus, "valid") == texts[9::10]
    assert told(corpus, "train") == [text for i, text in enumerate(texts) if i % 10 != 9]
    assert corpus.train.dtype == np.uint16 and corpus.vocab_size <= 400
    assert not corpus.fallback and corpus.name == "builtin"


def test_a_second_start_reads_no_text(get, monkeypatch):
    first = get()
    monkeypatch.setattr(tokens, "write", None)
    second = get()
    assert second.fingerprint == first.fingerprint
    assert np.array_equal(second.train, first.train)


def test_a_path_gives_the_stories_of_its_files(get, tmp_path):
    text = list(stories.stories(50))
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text(f"\n{SEPARATOR}\n".join(text[:20]) + "\n")
    with gzip.open(folder / "b.txt.gz", "wt") as file:
        file.write(SEPARATOR.join(text[20:40]))
    (folder / "valid.txt").write_text(SEPARATOR.join(text[40:]))
    (folder / "titles.json").write_text("{}")

    whole = get(folder, num_stories=0)
    assert (told(whole, "train"), told(whole, "valid")) == (text[:40], text[40:])
    part = get(folder, num_stories=30, holdout=0.1)
    assert (told(part, "train"), told(part, "valid")) == (text[:30], text[40:43])


def test_a_few_stories_are_held_out_by_their_text(get, tmp_path):
    file = tmp_path / "book.txt"
    text = "\n\n".join(stories.stories(30))
    file.write_text(text)
    corpus = get(file, holdout=0.2)
    (train,), (valid,) = told(corpus, "train"), told(corpus, "valid")
    gap = text[len(train) : -len(valid)]
    assert text == train + gap + valid and gap.isspace()
    assert 0.1 < len(valid) / len(text) < 0.4


def test_pieces_of_a_long_text_make_the_same_tokens_however_it_arrives(monkeypatch):
    text = "\n\n".join(stories.stories(80))
    monkeypatch.setattr(sources, "PIECE", 1000)
    pieces = list(sources.cut([text]))
    assert len(pieces) > 20 and [piece.ends for piece in pieces[-2:]] == [False, True]
    assert "".join(piece.text for piece in pieces) == text
    in_blocks = (text[i : i + 77] for i in range(0, len(text), 77))
    assert list(sources.cut(in_blocks)) == pieces

    tokenizer = tokens.learn(iter([text]), 400)
    ids = [i for piece in pieces for i in tokenizer.encode(piece.text).ids]
    assert ids == tokenizer.encode(text).ids


def test_a_changed_file_is_read_again(get, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text(SEPARATOR.join(stories.stories(30)))
    before = get(file)
    file.write_text(SEPARATOR.join(stories.stories(30, seed=1)))
    assert get(file).fingerprint != before.fingerprint


def test_a_tokenizer_from_a_folder_ends_stories_with_its_own_token(get, tmp_path):
    tokenizer = tokens.learn(stories.stories(30), 300)
    text = tokenizer.to_str().replace(SEPARATOR, "<end>")
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    corpus = get(tokenizer=str(tmp_path))
    assert corpus.tokenizer.id_to_token(corpus.eos) == "<end>"
    assert corpus.train[-1] == corpus.valid[-1] == corpus.eos
    with pytest.raises(InputError, match=r"data.tokenizer = .* 300 tokens.*model.vocab_size = 299"):
        get(tokenizer=str(tmp_path), vocab_size=299)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"model": {"type": "BPE"}}'])
def test_a_damaged_file_of_a_tokenizer_is_one_line(get, tmp_path, name, content):
    text = tokens.learn(stories.stories(30), 300).to_str().replace(SEPARATOR, "<end>")
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as raised:
        get(tokenizer=str(tmp_path))
    message = str(raised.value)
    assert "data.tokenizer" in message and str(tmp_path) in message and "\n" not in message


def test_a_text_that_changes_while_it_is_read_is_refused(get, tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text(SEPARATOR.join(stories.stories(30)))
    write = tokens.write
    monkeypatch.setattr(tokens, "write", lambda *args: (write(*args), file.write_text("other")))
    with pytest.raises(InputError, match="changed while it was read"):
        get(file)


def test_auto_falls_back_loudly_where_datasets_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    said = []
    corpus = prepare(DataConfig(num_stories=60, cache=tmp_path), 0, said.append)
    assert corpus.fallback and corpus.name == "builtin"
    assert "pip install datasets" in said[0] and "BUILT-IN" in said[1]


def test_a_batch_follows_from_seed_and_index_alone():
    text = np.arange(5000, dtype=np.uint16)
    one = batch(text, seq_len=16, size=4, seed=3, index=7)
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(one, batch(text, seq_len=16, size=4, seed=3, index=7))
    assert one.shape == (4, 17) and one.dtype == torch.int64
    assert torch.equal(one[:, 1:], one[:, :-1] + 1), "targets are the inputs, one further"
    for seed, index in ((3, 8), (4, 7), (7, 3), (0, 7)):
        assert not torch.equal(one, batch(text, seq_len=16, size=4, seed=seed, index=index))


def test_the_runs_seed_decides_its_batches(get):
    corpus = get()

    def first(seed):
        stage = stages(tiny())[0]
        return next(batches(corpus.train, stage, seed, torch.device("cpu")))

    assert torch.equal(first(3), first(3)) and not torch.equal(first(3), first(4))


def test_batches_reach_the_first_and_the_last_token():
    drawn = batch(np.arange(20, dtype=np.uint16), seq_len=16, size=200, seed=0, index=0)
    assert (drawn.min(), drawn.max()) == (0, 19)


def test_windows_lie_side_by_side_and_stay_within_the_limit():
    text = np.arange(1000, dtype=np.uint16)
    fixed = windows(text, seq_len=9, limit_tokens=255)
    assert torch.equal(fixed.flatten(), torch.arange(250)) and fixed.shape == (25, 10)
    assert windows(text, seq_len=9, limit_tokens=0).shape == (1, 10)
    assert windows(text, seq_len=9, limit_tokens=10**6).shape == (100, 10)


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("gone.txt", None, "no such file or folder"),
        ("stroies.txt", None, "perhaps stories.txt"),
        ("empty.txt", b"", "no text"),
        ("blank.txt", b"\n<|endoftext|>\n \n", "no text"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "not UTF-8"),
        ("notes.pdf", b"text", ".txt or .txt.gz"),
        ("torn.txt.gz", gzip.compress(b"text" * 1000, mtime=0)[:-9], "damaged gzip"),
        ("false.txt.gz", b"text", "damaged gzip"),
    ],
)
def test_a_bad_file_is_one_line(get, tmp_path, name, content, says):
    (tmp_path / "stories.txt").write_text("text")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says) as raised:
        get(tmp_path / name)
    message = str(raised.value)
    assert name in message and "data.source" in message and "\n" not in message


@pytest.mark.parametrize(
    "config, says",
    [
        ({"source": "hub:"}, "data.source = hub:"),
        ({"source": "x" * 5000}, "data.source = xxx"),
        ({"source": "~nobody-of-that-name/a.txt"}, "data.source = ~nobody"),
        ({"tokenizer": "~nobody-of-that-name"}, "data.tokenizer = ~nobody"),
        ({"tokenizer": "x" * 5000}, "data.tokenizer = xxx"),
        ({"tokenizer": "no such name"}, "data.tokenizer: .*no such name"),
        ({"cache": Path("~nobody-of-that-name/cache")}, "data.cache = ~nobody"),
        ({"tokenizer": "/no/such/folder"}, "data.tokenizer = /no/such/folder"),
        ({"cache": Path("/dev/null/cache")}, "data.cache = /dev/null/cache"),
        ({"vocab_size": 100}, "model.vocab_size = 100"),
    ],
)
def test_a_bad_setting_is_one_line(get, config, says):
    with pytest.raises(InputError, match=says) as raised:
        get(**config)
    assert "\n" not in str(raised.value)


def test_a_folder_without_text_is_refused(get, tmp_path):
    (tmp_path / "notes.md").write_text("text")
    with pytest.raises(InputError, match=r"the folder holds no \.txt"):
        get(tmp_path)


def test_a_text_shorter_than_the_context_is_refused(get):
    corpus = get()
    check_length(corpus, 16)
    with pytest.raises(InputError, match=r"training text has \d+ tokens.*model.seq_len = 100000"):
        check_length(corpus, 100_000)
    with pytest.raises(InputError, match="held-out text"):
        check_length(corpus, len(corpus.valid))
