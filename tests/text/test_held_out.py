"""What is held out: files and splits by their names, documents by their share of the text."""

from pathlib import Path

import numpy as np
import pytest

from utils.text.held_out import TEST, TRAIN, VALID, choose_documents, sort_files, splits_for


def kinds(*names: str) -> dict[str, list[str]]:
    return {kind: list(map(str, files)) for kind, files in sort_files(map(Path, names)).items()}


@pytest.mark.parametrize(
    "name", ["valid.txt", "Valid.TXT", "validation.md", "val.jsonl.gz", "DEV.txt", "valid-01.txt"]
)
def test_a_file_is_held_out_whose_whole_name_says_so(name):
    assert kinds("a.txt", name) == {TRAIN: ["a.txt"], VALID: [name], TEST: []}


@pytest.mark.parametrize(
    "name",
    [
        "valid_reasons.txt",
        "driving_test.txt",
        "The Test.md",
        "a-valid.txt",
        "invalid.md",
        "1984.txt",
    ],
)
def test_a_text_with_such_a_word_in_its_name_is_a_text_like_any_other(name):
    assert kinds("a.txt", name) == {TRAIN: ["a.txt", name], VALID: [], TEST: []}


def test_a_name_counts_beside_the_same_name_for_training():
    names = ("TinyStories-train.txt", "TinyStories-Valid.txt", "TinyStories-test.txt")
    assert kinds(*names) == {TRAIN: [names[0]], VALID: [names[1]], TEST: [names[2]]}
    shards = ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet")
    held_out = ("validation-00000-of-00001.parquet", "test-00000-of-00001.parquet")
    assert kinds(*shards, *held_out) == {
        TRAIN: list(shards),
        VALID: [held_out[0]],
        TEST: [held_out[1]],
    }


def test_the_hash_of_a_part_is_no_word_of_its_name():
    train, valid, test = (
        "train-00000-of-00001-a09b74b3ef9c3b5f.parquet",
        "validation-00000-of-00001-8c7cd4f2a7ef4b2a.parquet",
        "test-00000-of-00001-70e2eb1dd5f3bb42.parquet",
    )
    assert kinds(train, valid, test) == {TRAIN: [train], VALID: [valid], TEST: [test]}
    prefixed = [f"stories-{name}" for name in (train, valid, test)]
    assert list(kinds(*prefixed).values()) == [[name] for name in prefixed]


@pytest.mark.parametrize("prefix", ["", "wmt14."])
@pytest.mark.parametrize("suffix", [".en.txt", ".de-en.jsonl.gz", ".zh-00000-of-00001.parquet"])
def test_a_language_may_follow_the_word_that_counts(prefix, suffix):
    names = [f"{prefix}{word}{suffix}" for word in ("train", "valid", "test")]
    assert list(kinds(*names).values()) == [[name] for name in names]


def test_a_folders_name_counts_for_all_that_is_in_it():
    files = ("a.txt", "dev/x/b.txt", "test/c.txt", "wiki_train/d.txt", "wiki_val/e.txt")
    assert kinds(*files) == {
        TRAIN: ["a.txt", "wiki_train/d.txt"],
        VALID: ["dev/x/b.txt", "wiki_val/e.txt"],
        TEST: ["test/c.txt"],
    }


@pytest.mark.parametrize(
    "splits, train, valid",
    [
        ("train validation test", "train", "validation"),
        ("test validation", "", "validation"),
        ("test_sft train_sft", "train_sft", ""),
        ("train validation_matched validation_mismatched test_matched", "train",
         "validation_matched validation_mismatched"),
        ("train train_small dev", "train", "dev"),
        ("train2014 val2014", "train2014", "val2014"),
        ("all", "", ""),
    ],
)  # fmt: skip
def test_splits_are_told_apart_by_their_first_word(splits, train, valid):
    names = splits.split()
    assert (splits_for(TRAIN, names), splits_for(VALID, names)) == (train.split(), valid.split())


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 0.4, 0.6, 0.9])
@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
def test_the_share_of_the_text_is_met_to_within_half_the_shortest_document(fraction, spread):
    lengths = np.exp(np.random.default_rng(0).normal(6, spread, 300)).astype(int).tolist()
    chosen = choose_documents(lengths, fraction)
    share = sum(lengths[i] for i in chosen)
    rest = [length for i, length in enumerate(lengths) if i not in chosen]
    assert chosen == choose_documents(lengths, fraction) and rest
    assert abs(share - fraction * sum(lengths)) <= min(rest) / 2 + 1e-6


def test_what_is_held_out_is_spread_over_the_text():
    chosen = sorted(choose_documents([100] * 1000, 0.05))
    gaps = np.diff([-1, *chosen, 1000])
    assert len(chosen) == 50 and gaps.max() <= 40 and gaps.min() >= 5


def test_one_long_document_among_many_is_not_held_out():
    lengths = [100, 120, 90, 110] * 5
    lengths[19] = 3 * sum(lengths)
    chosen = choose_documents(lengths, 0.05)
    share = sum(lengths[i] for i in chosen) / sum(lengths)
    assert 19 not in chosen and share == pytest.approx(0.05, abs=0.01)


def test_of_a_few_documents_one_is_held_out_whole_unless_that_is_most_of_the_text():
    assert len(choose_documents([100, 100, 100], 0.05)) == 1
    assert choose_documents([100, 60], 0.05) == {1}
    assert choose_documents([100], 0.5) == choose_documents([1000, 2], 0.05) == set()
    assert len(choose_documents([100, 100], 0.9)) == 1
