"""A hub that breaks off, stalls or breaks down on the way, and damage in its clients' cache."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hub import serving

from utils import tokens

pytest.importorskip("datasets")
from test_hub import ROOT, TEXTS, TRAIN, VALID, joined, table

PREPARE = """
import json, sys
from pathlib import Path
from config import DataConfig, InputError
from utils import hub, traffic
from utils.data import prepare
traffic.PATIENCE = 0.9

def result(cache, tinystories="", spoil="", **config):
    hub.TINYSTORIES = tinystories
    for path in cache.parent.glob(f"hf/hub/*/snapshots/*/{spoil}") if spoil else []:
        path.write_bytes(path.read_bytes().replace(b"e", b"\\xe9", 1))
    said = []
    try:
        corpus = prepare(DataConfig(cache=cache, **config), 0, said.append)
        valid = corpus.tokenizer.decode(corpus.valid, skip_special_tokens=False)
        told = {"fallback": corpus.fallback, "valid": valid}
    except InputError as error:
        told = {"error": str(error)}
    left = [path.name for path in cache.glob("*") if not (path / "manifest.json").exists()]
    return told | {"said": said, "left": left}

folder, configs = Path(sys.argv[1]), json.loads(sys.argv[2])
print(json.dumps([result(folder / str(i), **config) for i, config in enumerate(configs)]))
"""


def prepared(folder: Path, endpoint: str, *configs: dict, offline: bool = False) -> list[dict]:
    """What starts make of it, each with an empty cache of its own, all in one process."""
    common = {"num_stories": 200, "holdout": 0.2, "tokenizer": "whole/gpt"}
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, str(folder), json.dumps([common | c for c in configs])],
        env=os.environ | settings | {"HF_HUB_OFFLINE": str(int(offline))},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "Retrying" not in done.stderr, "the clients keep their tries to themselves"
    results = json.loads(done.stdout)
    assert not any(result["left"] for result in results), "nothing half is left"
    return results


def repositories() -> dict[str, bytes]:
    """Whole ones, and those that fail at once (`early`) or in the second file (`late`)."""
    tokenizer = tokens.learn(iter(TEXTS), 400).to_str().encode()
    files = {}
    for fault in ("whole", "CLOSES", "STALLS", "CRAWLS", "BUSY"):
        late = f"datasets/late/{fault.lower()}"
        files |= {
            f"{fault}/gpt/tokenizer.json": tokenizer,
            f"datasets/early/{fault}/train.parquet": table("text", TRAIN),
            f"{late}/README.md": b"---\nlicense: mit\n---\n# Stories",
            f"{late}/train-0.parquet": table("text", TRAIN[:100]),
            f"{late}/train-1-{fault}.parquet": table("text", TRAIN[100:]),
            f"{late}/validation.parquet": table("text", VALID),
        }
    return files


def test_a_hub_that_fails_on_the_way_is_given_up_and_a_slow_one_is_not(tmp_path):
    builtin = {"source": "builtin"}
    groups = {
        "a": [{"tinystories": "late/closes"}, {"tinystories": "early/BUSY"}],
        "b": [{"tinystories": "late/stalls"}, {"tinystories": "early/STALLS"}],
        "c": [
            {"tinystories": "late/crawls"},
            {"tokenizer": "CLOSES/gpt"} | builtin,
            {"tokenizer": "STALLS/gpt"} | builtin,
        ],
    }
    with serving(repositories()) as hub, ThreadPoolExecutor() as pool:
        started = [
            pool.submit(prepared, tmp_path / name, hub.endpoint, *configs)
            for name, configs in groups.items()
        ]
        (closes, busy), (stalls, at_once), (crawls, *tokenizers) = (s.result() for s in started)

    for failed in (closes, stalls, *tokenizers):
        assert "--data.source builtin" in failed["error"] and "\n" not in failed["error"]
        assert not failed["said"]
    for failed in (closes, stalls):
        assert "64 texts had come" in failed["error"], "too late to make do with others"
    for failed in (busy, at_once):
        assert failed["fallback"] and "--data.source builtin" in failed["said"][0]
    assert "it answered 503" in busy["said"][0]
    assert not crawls["fallback"] and crawls["valid"] == joined(VALID)


def test_damage_in_the_clients_cache_is_mended_or_named(tmp_path):
    whole, builtin = {"tinystories": "late/whole"}, {"source": "builtin"}
    with serving(repositories()) as hub:
        results = prepared(
            tmp_path,
            hub.endpoint,
            whole,
            whole | {"spoil": "tokenizer.json"},
            whole | {"spoil": "README.md"},
        )
    assert [result["valid"] for result in results] == [joined(VALID)] * 3
    assert not any(result["said"] for result in results)

    for cache in tmp_path.glob("[0-9]"):
        cache.rename(cache.with_name(f"old-{cache.name}"))
    damaged = builtin | {"spoil": "tokenizer.json"}
    (offline,) = prepared(tmp_path, hub.endpoint, damaged, offline=True)
    error = offline["error"]
    assert "tokenizer.json is damaged (delete it)" in error and "HF_HUB_OFFLINE is set" in error
    assert "--data.tokenizer" in error and "\n" not in error
