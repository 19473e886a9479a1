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


REASONS = {
    "own/GATED": ("it is gated: accept its conditions", "hf auth login", "HF_TOKEN"),
    "own/PRIVATE": ("the hub shows you none of that name", "private", "hf auth login"),
    "own/none": ("the hub shows you none of that name", "check it"),
    "own/FORBIDDEN": ("does not let you have it (403)", "hf auth login"),
}
"""What is said of each repository that is not to be had."""
ASK = """
import json, sys
from pathlib import Path
from config import DataConfig, InputError
from utils.data import prepare_corpus
from utils.hf.pretrained import find_pretrained
from utils.runtime import stall_monitor
stall_monitor.PATIENCE_S, stall_monitor.GRACE_S = 2, 1

def ask(call):
    try:
        call()
    except InputError as error:
        return str(error)

def ask_for(name, source):
    config = DataConfig(source, tokenizer=name, cache=Path(sys.argv[1]))
    return ask(lambda: prepare_corpus(config, 0))

print(json.dumps({
    name: [
        ask(lambda: find_pretrained(name)),
        ask_for(name, "builtin"),
        ask_for("learned", f"hub:{name}"),
    ]
    for name in sys.argv[2:]
}))
"""


def test_what_is_not_to_be_had_says_why_and_what_to_do(tmp_path):
    with serve_hub({"own/empty/README.md": b"# Nothing"}) as hub:
        args = [str(tmp_path / "cache"), *REASONS, "own/LIMITED", "own/empty"]
        answers = run_with_hub(ASK, tmp_path, hub.endpoint, args, offline=False)
    model, _, _ = answers.pop("own/empty")
    limited, _, _ = answers.pop("own/LIMITED")
    assert "its rate limit is reached (429)" in limited
    assert model == "own/empty: it has no config.json"
    for name, errors in answers.items():
        for error in errors:
            assert "\n" not in error and all(phrase in error for phrase in REASONS[name]), error
            assert "no such" not in error, "that is not known"


def test_several_configurations_are_listed_with_the_flag_that_chooses(tmp_path):
    card = """---
configs:
- config_name: old
  data_files: old.parquet
- config_name: new
  data_files: new.parquet
---
"""
    names = {"README.md": card.encode(), "old.parquet": make_parquet(TRAIN)}
    names["new.parquet"] = make_parquet(VALID)
    with serve_hub({f"datasets/own/two/{name}": file for name, file in names.items()}) as hub:
        error = prepare(tmp_path, hub.endpoint, source="hub:own/two")["error"]
    assert "--data.config takes one of 'old', 'new'" in error and "\n" not in error


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
