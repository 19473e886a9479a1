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

PREPARE = """
import json, sys
from pathlib import Path
from config import DataConfig, InputError
from utils.data import prepare_corpus
warnings = []
config = DataConfig(cache=Path(sys.argv[1]), **json.loads(sys.argv[2]))
try:
    corpus = prepare_corpus(config, 0, warnings.append)
    result = {
        "train": corpus.tokenizer.decode(corpus.train, skip_special_tokens=False),
        "valid": corpus.tokenizer.decode(corpus.valid, skip_special_tokens=False),
        "name": corpus.name, "is_fallback": corpus.is_fallback,
        "fingerprint": corpus.fingerprint,
    }
except InputError as error:
    result = {"error": str(error)}
print(json.dumps(result | {"warnings": warnings, "modules": list(sys.modules)}))
"""


def prepare(folder: Path, endpoint: str, offline: bool = False, **config) -> dict:
    """What a start makes of it."""
    args = [str(folder / "cache"), json.dumps(config)]
    return run_with_hub(PREPARE, folder, endpoint, args, offline)


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
        result = prepare(tmp_path, hub.endpoint, source="tinystories")
    assert "data.text_field = text" in result["error"] and "story" in result["error"]


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
