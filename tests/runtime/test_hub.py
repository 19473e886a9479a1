"""TinyStories and GPT-2's tokenizer, from a stand-in for the hub."""

import json
from pathlib import Path

import pytest

from tests.helpers.fake_hub import (
    TEXTS,
    TRAIN,
    VALID,
    join_stories,
    make_parquet,
    run_with_hub,
    serve_hub,
)
from utils.text.tokenizer import learn_tokenizer

pytest.importorskip("datasets")

CHAT_CARD = """---
configs:
- config_name: sft
  data_files:
  - {split: test_sft, path: b.parquet}
  - {split: train_sft, path: a.parquet}
- config_name: gen
  data_files:
  - {split: train_gen, path: b.parquet}
---
"""
PREPARE = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from config import DataConfig, InputError
from utils.data import prepare_corpus

def prepare(**options):
    warnings = []
    try:
        corpus = prepare_corpus(DataConfig(cache=Path(sys.argv[1]), **options), 0, warnings.append)
        result = {
            "train": corpus.tokenizer.decode(corpus.train, skip_special_tokens=False),
            "valid": corpus.tokenizer.decode(corpus.valid, skip_special_tokens=False),
            "name": corpus.name, "is_fallback": corpus.is_fallback,
            "fingerprint": corpus.fingerprint, "record": asdict(corpus.record),
        }
    except InputError as error:
        result = {"error": str(error)}
    return result | {"warnings": warnings, "modules": list(sys.modules)}

print(json.dumps([prepare(**options) for options in json.loads(sys.argv[2])]))
"""


def prepare_each(folder: Path, endpoint: str, *configs: dict, offline: bool = False) -> list[dict]:
    """What starts make of it, one after the other in one process."""
    args = [str(folder / "cache"), json.dumps(configs)]
    return run_with_hub(PREPARE, folder, endpoint, args, offline)


def prepare(folder: Path, endpoint: str, offline: bool = False, **config) -> dict:
    """What a start makes of it."""
    return prepare_each(folder, endpoint, config, offline=offline)[0]


def repositories(column: str = "text") -> dict[str, bytes]:
    data = "datasets/roneneldan/TinyStories/data"
    tokenizer = learn_tokenizer(iter(TEXTS), 400)
    return {
        f"{data}/train-00000-of-00001.parquet": make_parquet(TRAIN, column),
        f"{data}/validation-00000-of-00001.parquet": make_parquet(VALID, column),
        "openai-community/gpt2/tokenizer.json": tokenizer.to_str().encode(),
    }


def test_auto_reads_tinystories_once_and_then_needs_no_hub(tmp_path):
    with serve_hub(repositories()) as hub:
        cold = prepare(tmp_path, hub.endpoint, num_stories=160)
    warm = prepare(tmp_path, hub.endpoint, offline=True, num_stories=160)

    assert cold["train"] == join_stories(TRAIN[:160])
    assert cold["valid"] == join_stories(VALID[:8]), "valid_fraction of the limit, of its own split"
    assert not cold["warnings"] and not cold["is_fallback"] and cold["name"] == "tinystories"
    assert warm["fingerprint"] == cold["fingerprint"]
    assert not {"datasets", "transformers", "huggingface_hub"} & set(warm["modules"])


def test_a_dataset_without_the_text_names_its_columns(tmp_path):
    with serve_hub(repositories(column="story")) as hub:
        configs = {"source": "tinystories", "text_field": "text"}, {"num_stories": 160}
        result, found = prepare_each(tmp_path, hub.endpoint, *configs)
    assert "data.text_field = text" in result["error"] and "(story)" in result["error"]
    assert found["train"] == join_stories(TRAIN[:160]), "its only column of text is taken"


def test_splits_are_taken_by_their_names_and_none_is_both(tmp_path):
    tokenizer = {"whole/gpt/tokenizer.json": learn_tokenizer(iter(TEXTS), 400).to_str().encode()}
    chat, test = "datasets/my/chat", "datasets/my/test"
    rows = [*TRAIN[:20], None]
    files = {
        f"{chat}/README.md": CHAT_CARD.encode(),
        f"{chat}/a.parquet": make_parquet(rows),
        f"{chat}/b.parquet": make_parquet(VALID),
        f"{test}/test.parquet": make_parquet(TRAIN),
        f"{test}/validation.parquet": make_parquet(VALID),
    }
    chat, test = (
        {"source": f"hub:{name}", "tokenizer": "whole/gpt"} for name in ("my/chat", "my/test")
    )
    swapped = {"split": "test_sft", "valid_split": "train_sft"}
    configs = (
        chat | {"config": "sft"},
        chat | {"config": "sft"} | swapped,
        chat | {"config": "gen"},
        test,
        test | {"split": "trian"},
    )
    with serve_hub(tokenizer | files) as hub:
        by_name, chosen, other, *errors = prepare_each(tmp_path, hub.endpoint, *configs)
    refused, unknown = (result["error"] for result in errors)
    texts = by_name["train"].split("<|endoftext|>")[:-1]
    assert sorted([*texts, by_name["valid"].removesuffix("<|endoftext|>")]) == sorted(TRAIN[:20])
    assert by_name["record"]["train"] == ["train_sft"] and by_name["record"]["valid"] == []
    assert by_name["record"]["left_out"] == ["test_sft (split)"]
    assert by_name["record"]["null_rows"] == {"train_sft": 1}
    assert chosen["train"] == join_stories(VALID) and chosen["valid"] == join_stories(TRAIN[:20])
    assert other["record"]["train"] == ["train_gen"]
    assert "has no split to train on, only validation, test; --data.split NAME" in refused
    assert "data.split = trian: dataset my/test has no such split, only validation, test" in unknown


def test_auto_falls_back_loudly_and_takes_tinystories_once_it_can(tmp_path):
    with serve_hub({}, is_broken=True) as hub:
        result = prepare(tmp_path, hub.endpoint, num_stories=50)
    assert result["is_fallback"] and result["name"] == "builtin"
    assert "TinyStories" in result["warnings"][0] and "BUILT-IN" in result["warnings"][1]

    with serve_hub(repositories()) as hub:
        assert not prepare(tmp_path, hub.endpoint, num_stories=50)["is_fallback"]


def test_without_a_hub_tinystories_is_an_error_that_names_the_ways_out(tmp_path):
    error = prepare(tmp_path, "http://127.0.0.1:9", source="tinystories")["error"]
    assert "\n" not in error
    for way_out in ("--data.source builtin", "PATH", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        assert way_out in error
