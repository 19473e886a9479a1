"""A hub that breaks off, stalls or breaks down on the way, and damage in its clients' cache."""

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
from utils.runtime import hub, stall_monitor
from utils.text.token_cache import MANIFEST
stall_monitor.PATIENCE_S = 0.9
stall_monitor.GRACE_S = 20  # a busy machine is not a silent hub

def prepare(cache, tinystories="", damage="", **config):
    hub.TINYSTORIES = tinystories
    damaged = list(cache.parent.glob(f"hf/hub/*/snapshots/*/{damage}")) if damage else []
    assert damaged or not damage, damage
    for path in damaged:
        path.write_bytes(path.read_bytes().replace(b"e", b"\\xe9", 1))
    warnings = []
    try:
        corpus = prepare_corpus(DataConfig(cache=cache, **config), 0, warnings.append)
        valid = corpus.tokenizer.decode(corpus.valid, skip_special_tokens=False)
        result = {"is_fallback": corpus.is_fallback, "valid": valid}
    except InputError as error:
        result = {"error": str(error)}
    partial = [path.name for path in cache.glob("*/") if not (path / MANIFEST).exists()]
    return result | {"warnings": warnings, "partial": partial}

folder, configs = Path(sys.argv[1]), json.loads(sys.argv[2])
print(json.dumps([prepare(folder / str(i), **config) for i, config in enumerate(configs)]))
"""


def prepare(folder: Path, endpoint: str, *configs: dict, offline: bool = False) -> list[dict]:
    """What starts make of it, each with an empty cache of its own, all in one process."""
    common = {"num_stories": 200, "valid_fraction": 0.2, "tokenizer": "whole/gpt"}
    args = [str(folder), json.dumps([common | config for config in configs])]
    results = run_with_hub(PREPARE, folder, endpoint, args, offline)
    assert not any(result["partial"] for result in results), "nothing half is left"
    return results


@pytest.fixture(scope="module")
def hub():
    """Serves whole repositories, and those that fail at once (`early`) or in the second file
    (`late`)."""
    tokenizer = learn_tokenizer(iter(TEXTS), 400).to_str().encode()
    files = {}
    for fault in ("whole", "CLOSES", "STALLS", "CRAWLS", "BUSY"):
        late = f"datasets/late/{fault.lower()}"
        files |= {
            f"{fault}/gpt/tokenizer.json": tokenizer,
            f"datasets/early/{fault}/train.parquet": make_parquet(TRAIN),
            f"{late}/README.md": b"---\nlicense: mit\n---\n# Stories",
            f"{late}/train-0.parquet": make_parquet(TRAIN[:100]),
            f"{late}/train-1-{fault}.parquet": make_parquet(TRAIN[100:]),
            f"{late}/validation.parquet": make_parquet(VALID),
        }
    with serve_hub(files) as hub:
        yield hub


def test_a_hub_that_fails_amid_the_texts_is_an_error(tmp_path, hub):
    configs = {"tinystories": "late/closes"}, {"tinystories": "late/stalls"}
    for failed in prepare(tmp_path, hub.endpoint, *configs):
        assert "--data.source builtin" in failed["error"] and "\n" not in failed["error"]
        assert "64 texts had come" in failed["error"], "too late to take others"
        assert not failed["warnings"]


def test_a_hub_that_fails_before_a_text_has_come_is_done_without(tmp_path, hub):
    configs = {"tinystories": "early/BUSY"}, {"tinystories": "early/STALLS"}
    busy, stalled = prepare(tmp_path, hub.endpoint, *configs)
    for failed in (busy, stalled):
        assert failed["is_fallback"] and "--data.source builtin" in failed["warnings"][0]
    assert "it answered 503" in busy["warnings"][0]


def test_a_hub_without_the_tokenizer_is_an_error_and_a_slow_one_is_not(tmp_path, hub):
    builtin = {"source": "builtin"}
    configs = {"tokenizer": "CLOSES/gpt"} | builtin, {"tokenizer": "STALLS/gpt"} | builtin
    *failures, slow = prepare(tmp_path, hub.endpoint, *configs, {"tinystories": "late/crawls"})
    for failed in failures:
        assert "--data.tokenizer learned" in failed["error"] and "\n" not in failed["error"]
        assert not failed["warnings"]
    assert not slow["is_fallback"] and slow["valid"] == join_stories(VALID)


def test_damage_in_the_clients_cache_is_mended_or_named(tmp_path, hub):
    whole, builtin = {"tinystories": "late/whole"}, {"source": "builtin"}
    damages = [{"damage": name} for name in ("", "tokenizer.json", "README.md")]
    results = prepare(tmp_path, hub.endpoint, *[whole | damage for damage in damages])
    assert [result["valid"] for result in results] == [join_stories(VALID)] * 3
    assert not any(result["warnings"] for result in results)

    for cache in tmp_path.glob("[0-9]"):
        cache.rename(cache.with_name(f"old-{cache.name}"))
    damaged = builtin | {"damage": "tokenizer.json"}
    (offline,) = prepare(tmp_path, hub.endpoint, damaged, offline=True)
    error = offline["error"]
    assert "tokenizer.json is damaged (delete it)" in error and "HF_HUB_OFFLINE is set" in error
    assert "--data.tokenizer" in error and "\n" not in error
