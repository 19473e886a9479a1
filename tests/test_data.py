"""Corpus -> tokens -> batches."""

import gzip
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from config import DataConfig, InputError, tiny
from utils import data
from utils.data import (
    Corpus,
    check_corpus_length,
    get_batch,
    prepare_corpus,
    spread_windows,
    valid_windows,
)
from utils.schedule.phases import resolve_phases
from utils.text import sources
from utils.text.builtin.stories import builtin_stories
from utils.text.sources import SEPARATOR
from utils.text.special_tokens import SpecialTokens
from utils.text.tokenizer import learn_tokenizer
from utils.training.step import batches


@pytest.fixture
def prepare(tmp_path):
    """Prepares a corpus whose tokens are cached under tmp_path."""

    def prepare(source="builtin", vocab_size=400, tokenizer="learned", **config) -> Corpus:
        config = {"num_stories": 60, "cache": tmp_path / "cache"} | config
        return prepare_corpus(DataConfig(str(source), tokenizer, **config), vocab_size)

    return prepare


def stories_of(corpus: Corpus, split: str) -> list[str]:
    text = corpus.tokenizer.decode(getattr(corpus, split), skip_special_tokens=False)
    *stories, rest = text.split(SEPARATOR)
    assert not rest, "an end of text closes every story"
    return stories


def test_tokens_decode_to_the_stories_and_a_share_of_them_is_validation_text(prepare):
    corpus = prepare(valid_fraction=0.1)
    texts = list(builtin_stories(60))
    train, valid = stories_of(corpus, "train"), stories_of(corpus, "valid")
    assert train == [text for text in texts if text not in valid]
    assert valid == [text for text in texts if text not in train]
    assert (corpus.train_documents, corpus.valid_documents) == (len(train), len(valid))
    assert sum(map(len, valid)) / sum(map(len, texts)) == pytest.approx(0.1, abs=0.01)
    assert corpus.train.dtype == np.uint16 and corpus.vocab_size <= 400
    assert not corpus.is_fallback and corpus.name == "builtin"


def test_a_second_start_reads_no_text(prepare, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text(SEPARATOR.join(builtin_stories(30)))
    first, stat = prepare(file), file.stat()
    file.write_bytes(bytes(stat.st_size))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # to all appearances unchanged
    second = prepare(file)
    assert second.fingerprint == first.fingerprint
    assert np.array_equal(second.train, first.train)


def test_a_changed_file_is_read_again(prepare, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text(SEPARATOR.join(builtin_stories(30)))
    before = prepare(file)
    file.write_text(SEPARATOR.join(builtin_stories(30, seed=1)))
    assert prepare(file).fingerprint != before.fingerprint


def test_a_text_that_changes_while_it_is_read_is_refused(prepare, tmp_path, monkeypatch):
    def write_and_change(*args):
        documents = write_tokens(*args)
        file.write_text("other")
        return documents

    file, write_tokens = tmp_path / "a.txt", data.write_tokens
    file.write_text(SEPARATOR.join(builtin_stories(30)))
    monkeypatch.setattr(data, "write_tokens", write_and_change)
    with pytest.raises(InputError, match="changed while it was read"):
        prepare(file)


def test_a_path_gives_the_stories_of_its_files(prepare, tmp_path):
    text = list(builtin_stories(50))
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text(f"\n{SEPARATOR}\n".join(text[:20]) + "\n")
    with gzip.open(folder / "b.txt.gz", "wt") as file:
        file.write(SEPARATOR.join(text[20:40]))
    (folder / "valid.txt").write_text(SEPARATOR.join(text[40:]))
    (folder / "titles.json").write_text("{}")

    whole = prepare(folder, num_stories=None)
    assert (stories_of(whole, "train"), stories_of(whole, "valid")) == (text[:40], text[40:])
    assert whole.record.train == ["a.txt", "b.txt.gz"] and whole.record.valid == ["valid.txt"]
    assert whole.record.left_out == ["titles.json (no text field)"] and not whole.record.is_cut
    part = prepare(folder, num_stories=30, valid_fraction=0.1)
    assert (stories_of(part, "train"), stories_of(part, "valid")) == (text[:30], text[40:43])
    assert part.record.is_cut
    enough = prepare(folder, num_stories=40, valid_fraction=0.25)
    assert not enough.record.is_cut, "there are no more"


def test_ones_own_text_is_read_whole_unless_asked_otherwise(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "HUB_STORIES", 30)
    file = tmp_path / "a.txt"
    file.write_text(SEPARATOR.join(builtin_stories(50)))
    corpus = prepare(file, num_stories=None)
    assert corpus.train_documents + corpus.valid_documents == 50 and not corpus.record.is_cut
    builtin = prepare(num_stories=None, builtin_stories=30)
    assert builtin.train_documents + builtin.valid_documents == 30 and not builtin.record.is_cut


def test_records_in_a_folder_are_stories_and_rows_without_a_text_are_counted(prepare, tmp_path):
    text, folder = list(builtin_stories(40)), tmp_path / "text"
    (folder / "sub").mkdir(parents=True)
    rows = [{"id": i, "story": story} for i, story in enumerate(text[:20])]
    lines = map(json.dumps, [*rows, {"id": 20, "story": None}])
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "sub/b.TXT").write_text(SEPARATOR.join(text[20:30]))
    (folder / "sub/dev.json").write_text(json.dumps(text[30:]))
    corpus = prepare(folder, num_stories=None)
    assert (stories_of(corpus, "train"), stories_of(corpus, "valid")) == (text[:30], text[30:])
    assert corpus.record.train == ["a.jsonl", "sub/b.TXT"]
    assert list(corpus.record.null_rows.values()) == [1, 0]
    assert prepare(folder, num_stories=0).record == corpus.record, "from the cache too"


def test_tokens_are_made_anew_when_what_they_follow_from_changes(prepare, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    rows = ({"text": story, "title": story.split(".")[0]} for story in builtin_stories(30))
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first = prepare(folder)
    assert prepare(folder, text_field="title").fingerprint != first.fingerprint
    (folder / "dev.txt").write_text("A text of its own.")
    assert prepare(folder).record.valid == ["dev.txt"]
    (folder / "notes.pdf").write_text("")
    assert prepare(folder).record.left_out == ["notes.pdf (not text)"]
    (folder / "dev.txt").rename(folder / "test.txt")
    renamed = prepare(folder)
    assert renamed.fingerprint == first.fingerprint and not renamed.record.valid
    assert renamed.record.left_out == ["test.txt (test text)", "notes.pdf (not text)"]


def test_the_end_of_a_text_of_one_document_is_validation_text(prepare, tmp_path):
    file = tmp_path / "book.txt"
    text = "\n\n".join(builtin_stories(30))
    file.write_text(text)
    corpus = prepare(file, valid_fraction=0.2)
    (train,), (valid,) = stories_of(corpus, "train"), stories_of(corpus, "valid")
    gap = text[len(train) : -len(valid)]
    assert text == train + gap + valid and gap.isspace()
    assert 0.1 < len(valid) / len(text) < 0.4
    assert corpus.record.splits_document


def test_a_tokenizer_must_fit_the_model(prepare, tmp_path):
    tokenizer = learn_tokenizer(builtin_stories(30), 300)
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts, file = list(builtin_stories(30)), tmp_path / "a.txt"
    file.write_text(SEPARATOR.join(texts))
    corpus = prepare(file, tokenizer=str(tmp_path), vocab_size=300)  # no text has a [PAD]
    assert corpus.train[-1] == corpus.valid[-1] == corpus.special_tokens.eos_id
    assert corpus.vocab_size == 301 and corpus.max_id == max(corpus.train) < 300
    file.write_text(SEPARATOR.join([*texts, "[PAD]", *texts]))
    for _ in range(2):  # read anew, and from the cache
        with pytest.raises(
            InputError, match=r"a.txt: token 300 \('\[PAD\]'\).* has 300 \(model.vo"
        ):
            prepare(file, tokenizer=str(tmp_path), vocab_size=300)
    assert prepare(file, tokenizer=str(tmp_path), vocab_size=301).max_id == 300


def test_the_end_of_a_text_must_fit_the_model(prepare, tmp_path, monkeypatch):
    text = learn_tokenizer(builtin_stories(30), 300).to_str().replace(SEPARATOR, "<begin>")
    tokenizer = Tokenizer.from_str(text)
    tokenizer.add_special_tokens([SEPARATOR])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(data, "write_tokens", lambda *args: pytest.fail("it is read for nothing"))
    with pytest.raises(InputError, match=r"^data.tokenizer = .*: token 300 \('<.endoftext.>'\)"):
        prepare(tokenizer=str(tmp_path), vocab_size=300)


def test_a_tokenizer_may_be_the_file_itself(prepare, tmp_path):
    learn_tokenizer(builtin_stories(30), 300).save(str(tmp_path / "my.json"))
    corpus = prepare(tokenizer=str(tmp_path / "my.json"), vocab_size=300)
    assert corpus.vocab_size == 300
    (tmp_path / "tokenizer.json").write_bytes((tmp_path / "my.json").read_bytes())
    assert prepare(tokenizer=str(tmp_path), vocab_size=300).fingerprint == corpus.fingerprint


def test_auto_falls_back_loudly_where_datasets_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    warnings = []
    corpus = prepare_corpus(DataConfig(num_stories=60, cache=tmp_path), 0, warnings.append)
    assert corpus.is_fallback and corpus.name == "builtin"
    assert "pip install datasets" in warnings[0] and "BUILT-IN" in warnings[1]


def test_a_batch_follows_from_seed_and_index_alone():
    text = np.arange(5000, dtype=np.uint16)
    batch = get_batch(text, seq_len=16, size=4, seed=3, index=7)
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(batch, get_batch(text, seq_len=16, size=4, seed=3, index=7))
    assert batch.shape == (4, 17) and batch.dtype == torch.int64
    assert torch.equal(batch[:, 1:], batch[:, :-1] + 1), "targets are the inputs, one further"
    for seed, index in ((3, 8), (4, 7), (7, 3), (0, 7)):
        other = get_batch(text, seq_len=16, size=4, seed=seed, index=index)
        assert not torch.equal(batch, other)


def test_the_runs_seed_decides_its_batches(prepare):
    def first_batch(seed):
        phase = resolve_phases(tiny())[0]
        return next(batches(corpus.train, phase, seed, torch.device("cpu")))

    corpus = prepare()
    assert torch.equal(first_batch(3), first_batch(3))
    assert not torch.equal(first_batch(3), first_batch(4))


def test_batches_reach_the_first_and_the_last_token():
    batch = get_batch(np.arange(20, dtype=np.uint16), seq_len=16, size=200, seed=0, index=0)
    assert (batch.min(), batch.max()) == (0, 19)


@pytest.mark.parametrize("length", [10, 18, 19, 20, 991, 1000, 10_007])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 100, 10**6])
def test_windows_are_spread_evenly_and_predict_no_token_twice(length, count):
    windows = spread_windows(np.arange(length, dtype=np.uint16), 9, count)
    assert len(windows) == max(1, min(count, (length - 1) // 9))
    predicted = windows[:, 1:].flatten().tolist()
    assert sorted(set(predicted)) == predicted, "in order, none twice"
    assert windows.min() >= 0 and windows.max() < length
    middles = windows.double().mean(1)
    stretch = (length - 1) / len(windows)
    even = (torch.arange(len(windows)) + 0.5) * stretch
    assert (middles - even).abs().max() <= 1


def make_valid_text(lengths: list[int]) -> Corpus:
    """A corpus whose validation documents, of these lengths, repeat their number, which is a token
    of one byte; 0 ends them."""
    valid = np.concatenate([[i] * (n - 1) + [0] for i, n in enumerate(lengths, 1)])
    return SimpleNamespace(
        valid=valid.astype(np.uint16),
        tokenizer=learn_tokenizer(iter(["text"]), 300),
        special_tokens=SpecialTokens((0,)),
    )


def test_each_document_has_its_share_of_what_is_evaluated():
    lengths = [5000, 1000, 3000, 11_000]
    corpus = make_valid_text(lengths)
    windows = valid_windows(corpus, 20, eval_tokens=2000, final_eval_tokens=8000)
    both = torch.cat([windows.regular, windows.further])
    assert (windows.tokens, windows.final_tokens) == (2000, 8000)
    assert (windows.documents, windows.final_documents) == (4, 4)
    for part in (windows.regular, both):
        counts = part.flatten().bincount()[1:] / part.numel()
        shares = torch.tensor(lengths) / sum(lengths)
        assert (counts - shares).abs().max() < 0.02


def test_a_phases_end_is_evaluated_on_the_other_windows_too_and_on_all_there_are():
    corpus = make_valid_text([50] * 30)
    windows = valid_windows(corpus, 10, eval_tokens=100, final_eval_tokens=10**6)
    rows = torch.cat([windows.regular, windows.further])
    assert windows.tokens == 100 and windows.final_tokens == 1490 and len(rows.unique(dim=0)) > 9
    assert windows.final_documents == 30 and windows.documents == 10
    assert windows.text_bytes == windows.regular[:, 1:].count_nonzero()
    assert windows.final_text_bytes == rows[:, 1:].count_nonzero()
    few = valid_windows(corpus, 10, eval_tokens=200, final_eval_tokens=0)
    assert few.tokens == few.final_tokens == 200 and not len(few.further)


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("gone.txt", None, "no such file or folder"),
        ("stroies.txt", None, "perhaps stories.txt"),
        ("empty.txt", b"", "no text"),
        ("blank.txt", b"\n<|endoftext|>\n \n", "no text"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "not UTF-8: line 1, byte offset 3"),
        ("notes.pdf", b"text", ".txt .md .jsonl .json .parquet, also as .gz, .xz or .zst"),
        ("torn.txt.gz", gzip.compress(b"text" * 1000, mtime=0)[:-9], "damaged"),
        ("false.txt.gz", b"text", "damaged"),
        ("rows.jsonl", b'{"a": "x", "b": "y"}', "--data.text-field NAME"),
    ],
)
def test_a_bad_file_is_one_line(prepare, tmp_path, name, content, reason):
    (tmp_path / "stories.txt").write_text("text")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=reason) as raised:
        prepare(tmp_path / name)
    message = str(raised.value)
    assert name in message and "data.source" in message and "\n" not in message


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"source": "hub:"}, "data.source = hub:"),
        ({"split": "train"}, "data.split = train: data.source = builtin is no dataset on the hub"),
        ({"source": "hub:a/b", "split": "x", "valid_split": "x"}, "data.split = x is data.valid_"),
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
def test_a_bad_setting_is_one_line(prepare, config, reason):
    with pytest.raises(InputError, match=reason) as raised:
        prepare(**config)
    assert "\n" not in str(raised.value)


def test_a_text_shorter_than_the_context_is_refused(prepare):
    corpus = prepare()
    check_corpus_length(corpus, 16)
    with pytest.raises(InputError, match=r"training text has \d+ tokens.*model.seq_len = 100000"):
        check_corpus_length(corpus, 100_000)
    with pytest.raises(InputError, match="validation text"):
        check_corpus_length(corpus, len(corpus.valid))
