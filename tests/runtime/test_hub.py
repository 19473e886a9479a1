"""TinyStories and GPT-2's tokenizer, from a stand-in for the hub."""

import json
from pathlib import Path

import pytest

from config import ModelConfig
from tests.helpers.fake_hub import (
    TEXTS,
    TRAIN,
    VALID,
    join_stories,
    make_parquet,
    run_with_hub,
    serve_hub,
)
from utils.text.sources import SEPARATOR
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

def prepare(vocab_size=0, **options):
    config, warnings = DataConfig(cache=Path(sys.argv[1]), **options), []
    try:
        corpus = prepare_corpus(config, vocab_size, warnings.append)
        result = {
            "train": corpus.tokenizer.decode(corpus.train, skip_special_tokens=False),
            "valid": corpus.tokenizer.decode(corpus.valid, skip_special_tokens=False),
            "name": corpus.name, "is_fallback": corpus.is_fallback,
            "tokenizer": corpus.tokenizer_name, "vocab_size": corpus.vocab_size,
            "has_fallback_tokenizer": corpus.has_fallback_tokenizer,
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


def test_own_text_without_a_hub_falls_back_to_a_learned_vocabulary_loudly(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text(SEPARATOR.join(TEXTS))
    own, gpt2 = {"source": str(file)}, ModelConfig.vocab_size
    configs = own, own | {"vocab_size": gpt2}, own | {"vocab_size": 300}
    with serve_hub({}, is_broken=True) as hub:
        *results, asked = prepare_each(
            tmp_path, hub.endpoint, *configs, own | {"tokenizer": "gpt2"}
        )
    for result in results:
        assert result["tokenizer"] == "learned" and result["has_fallback_tokenizer"]
        assert "no tokenizer of GPT-2" in result["warnings"][0]
        assert "LEARNED" in result["warnings"][1] and not result["is_fallback"]
    free, default, few = (result["vocab_size"] for result in results)
    assert free == default > few == 300, "the default of model.vocab_size is GPT-2's number"
    assert "--data.tokenizer learned" in asked["error"] and not asked["warnings"]

    with serve_hub(repositories()) as hub:
        again = prepare(tmp_path, hub.endpoint, **own)
    assert again["tokenizer"] == "openai-community/gpt2" and not again["has_fallback_tokenizer"]


RESUME = """
import contextlib, io, json, os, sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch
from tests.helpers.fake_hub import serve_hub
from tests.helpers.small_runs import TRAINING, small_run

folder, text = Path(sys.argv[1]), sys.argv[2]

def start_and_resume(hub, name, is_online, source):
    run, phases = small_run(folder, TRAINING), {"only": Phase(steps=2, batch_size=2)}
    data = replace(run.data, source=source)
    model = replace(run.model, vocab_size=ModelConfig.vocab_size)
    run = replace(run, out=folder / name, data=data, model=model, phases=phases)
    outputs = []
    for resume in (False, True):
        hub.is_broken = is_online == resume
        if resume:  # tokens are made anew
            run = replace(run, data=replace(data, cache=folder / f"{name}-cache"), resume=True)
        stop = None if resume else KeyboardInterrupt  # once a point is kept
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.suppress(KeyboardInterrupt):
            with patch("utils.training.phase.sample_stories", side_effect=stop, return_value=[]):
                main(run)
        outputs.append(" ".join(output.getvalue().split()))
    events = read_history(run.out / HISTORY_FILE)
    fields = "corpus", "fallback", "tokenizer", "tokenizer_fallback"
    return {field: events[0][field] for field in fields} | {
        "vocab_size": events[0]["config"]["model"]["vocab_size"],
        "outputs": outputs, "ended": events[-1]["event"],
    }

with serve_hub({}) as hub:
    os.environ["HF_ENDPOINT"] = hub.endpoint  # which the clients read when they are imported
    from config import ModelConfig, Phase
    from tests.runtime.test_hub import repositories
    from train import main
    from utils.metrics.history import HISTORY_FILE, read_history
    hub.files = repositories()
    results = {
        "own, offline": start_and_resume(hub, "a", False, text),
        "own, online": start_and_resume(hub, "b", True, text),
        "auto, offline": start_and_resume(hub, "c", False, "auto"),
    }
print(json.dumps(results))
"""


def test_a_resumed_run_keeps_what_auto_came_to_be_whatever_has_become_of_the_hub(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text(SEPARATOR.join(TEXTS))
    results = run_with_hub(RESUME, tmp_path, "", [str(tmp_path), str(file)], offline=False)
    assert [result.pop("ended") for result in results.values()] == ["end"] * 3
    outputs = {name: result.pop("outputs") for name, result in results.items()}
    own = {"corpus": str(file), "fallback": False}
    gpt2 = {"tokenizer": "openai-community/gpt2", "vocab_size": ModelConfig.vocab_size}
    learned = {"tokenizer": "learned", "vocab_size": results["own, offline"]["vocab_size"]}
    assert learned["vocab_size"] < 2049
    assert results["own, offline"] == own | learned | {"tokenizer_fallback": True}
    assert results["own, online"] == own | gpt2 | {"tokenizer_fallback": False}
    builtin = results["auto, offline"]
    assert (builtin["corpus"], builtin["fallback"], builtin["tokenizer"]) == (
        "builtin", True, "learned"
    )  # fmt: skip
    for name, loud in (("own, offline", "LEARNED VOCABULARY"), ("auto, offline", "BUILT-IN STOR")):
        assert all(output.count(loud) == 1 for output in outputs[name])
        assert "WARNING" in outputs[name][0] and "WARNING" not in outputs[name][1]
    assert not any("LEARNED" in output for output in outputs["own, online"])


def test_without_a_hub_tinystories_is_an_error_that_names_the_ways_out(tmp_path):
    error = prepare(tmp_path, "http://127.0.0.1:9", source="tinystories")["error"]
    assert "\n" not in error
    for way_out in ("--data.source builtin", "PATH", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        assert way_out in error
