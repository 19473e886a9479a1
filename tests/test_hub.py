"""TinyStories and GPT-2's tokenizer, from a stand-in for the hub."""

import io
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
from hub import serving

from utils import stories, tokens, traffic

pytest.importorskip("datasets")
parquet = pytest.importorskip("pyarrow.parquet")
pyarrow = pytest.importorskip("pyarrow")

ROOT = Path(__file__).parent.parent
TEXTS = list(stories.stories(240))
TRAIN, VALID = TEXTS[:200], TEXTS[200:]
PREPARE = """
import json, sys
from pathlib import Path
from config import DataConfig, InputError
from utils.data import prepare
said = []
config = DataConfig(cache=Path(sys.argv[1]), **json.loads(sys.argv[2]))
try:
    corpus = prepare(config, 0, said.append)
    result = {
        "train": corpus.tokenizer.decode(corpus.train, skip_special_tokens=False),
        "valid": corpus.tokenizer.decode(corpus.valid, skip_special_tokens=False),
        "name": corpus.name, "fallback": corpus.fallback, "fingerprint": corpus.fingerprint,
    }
except InputError as error:
    result = {"error": str(error)}
print(json.dumps(result | {"said": said, "modules": list(sys.modules)}))
"""


def prepared(folder: Path, endpoint: str, offline: bool = False, **config) -> dict:
    """What a start makes of it, in a process of its own: the clients read their settings once."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PREPARE, str(folder / "cache"), json.dumps(config)]
    done = subprocess.run(
        command,
        env=os.environ | settings | {"HF_HUB_OFFLINE": str(int(offline))},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def joined(texts: list[str]) -> str:
    return "".join(f"{text}<|endoftext|>" for text in texts)


def table(column: str, texts: list[str]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({column: texts}), file)
    return file.getvalue()


def repositories(column: str = "text") -> dict[str, bytes]:
    data = "datasets/roneneldan/TinyStories/data"
    tokenizer = tokens.learn(iter(TEXTS), 400)
    return {
        f"{data}/train-00000-of-00001.parquet": table(column, TRAIN),
        f"{data}/validation-00000-of-00001.parquet": table(column, VALID),
        "openai-community/gpt2/tokenizer.json": tokenizer.to_str().encode(),
    }


def test_auto_reads_tinystories_once_and_then_needs_no_hub(tmp_path):
    with serving(repositories()) as hub:
        cold = prepared(tmp_path, hub.endpoint, num_stories=160)
    warm = prepared(tmp_path, hub.endpoint, offline=True, num_stories=160)

    assert cold["train"] == joined(TRAIN[:160])
    assert cold["valid"] == joined(VALID[:8]), "as large a share of its own split as is held out"
    assert not cold["said"] and not cold["fallback"] and cold["name"] == "tinystories"
    assert warm["fingerprint"] == cold["fingerprint"]
    assert not {"datasets", "transformers", "huggingface_hub"} & set(warm["modules"])


def test_a_dataset_without_the_text_names_its_columns(tmp_path):
    with serving(repositories(column="story")) as hub:
        result = prepared(tmp_path, hub.endpoint, source="tinystories")
    assert "data.text_field = text" in result["error"] and "story" in result["error"]


def test_auto_falls_back_loudly_and_soon_and_takes_tinystories_once_it_can(tmp_path):
    start = time.monotonic()
    with serving({}, broken=True) as hub:
        result = prepared(tmp_path, hub.endpoint, num_stories=50)
    assert time.monotonic() - start < 15
    assert result["fallback"] and result["name"] == "builtin"
    assert "TinyStories" in result["said"][0] and "BUILT-IN" in result["said"][1]

    with serving(repositories()) as hub:
        assert not prepared(tmp_path, hub.endpoint, num_stories=50)["fallback"]


def test_without_a_hub_tinystories_is_an_error_that_names_the_ways_out(tmp_path):
    error = prepared(tmp_path, "http://127.0.0.1:9", source="tinystories")["error"]
    assert "\n" not in error
    for way_out in ("--data.source builtin", "PATH", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        assert way_out in error


class Late(Future):
    """Has told its result while its thread is still at work."""

    def set_result(self, result):
        super().set_result(result)
        time.sleep(0.1)


def test_no_thread_outlives_the_wait_for_the_hub(monkeypatch):
    """It could be the last to hold a file that is half read; to free that while the interpreter
    shuts down is an abort, in Arrow's destructors."""
    monkeypatch.setattr(traffic, "Future", Late)
    before = set(threading.enumerate())
    assert traffic.soon(lambda: 1) == 1
    assert set(threading.enumerate()) <= before
