"""In from transformers' format, and out again."""

import json
import os
import shutil
import subprocess
import sys
from functools import reduce
from pathlib import Path

import llamas
import pytest
import torch
from hub import serving
from llamas import MODELS, assert_same, make, some_tokens, their_logits
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from config import InputError
from utils import hf, pretrained
from utils.checkpoint import load

ROOT = Path(__file__).parent.parent
theirs = llamas.theirs
every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_an_imported_model_computes_what_it_did(theirs, name, tmp_path):
    hf.import_(str(theirs[name]), tmp_path / "a.pt")
    saved = load(tmp_path / "a.pt")
    with torch.no_grad():
        assert_same(saved.state.model()(some_tokens()).logits, their_logits(theirs[name]))
    assert saved.eos == 0 and saved.config.seq_len == MODELS[name]["max_position_embeddings"]
    with pytest.raises(InputError, match=r"a.pt is there: --overwrite"):
        hf.import_(str(theirs[name]), tmp_path / "a.pt")


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_in_and_out_again_every_weight_is_what_it_was_bit_for_bit(name, dtype, tmp_path):
    there = make(tmp_path / "there", MODELS[name], dtype)
    hf.import_(str(there), tmp_path / "a.pt")
    hf.export(tmp_path / "a.pt", tmp_path / "back")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (there, tmp_path / "back")
    )
    assert before.keys() == after.keys()
    for tensor, weight in before.items():
        assert weight.dtype == after[tensor].dtype == dtype and torch.equal(weight, after[tensor])
    one, other = (AutoConfig.from_pretrained(f).to_dict() for f in (there, tmp_path / "back"))
    free = {"_name_or_path", "bos_token_id", "initializer_range"}
    assert {k: one[k] for k in one.keys() - free} == {k: other[k] for k in one.keys() - free}


def test_weights_in_several_files_are_the_same_weights(theirs, tmp_path):
    folder = tmp_path / "shards"
    shutil.copytree(theirs["llama3"], folder)
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    size = pretrained.save_weights(folder, whole, limit=100_000)
    files = sorted(folder.glob("model-*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 3
    assert size == sum(file.stat().st_size for file in files)
    assert all(
        torch.equal(reduce(dict.__or__, map(load_file, files))[n], w) for n, w in whole.items()
    )
    assert torch.equal(their_logits(folder), their_logits(theirs["llama3"]))
    found = [pretrained.find(str(f)).state().weights for f in (folder, theirs["llama3"])]
    assert all(torch.equal(found[0][name], weight) for name, weight in found[1].items())
    files[1].unlink()
    with pytest.raises(InputError, match=f"{files[1].name} is missing"):
        pretrained.find(str(folder))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"model_type": "qwen2"}, "model_type = qwen2: only llama and mixtral"),
        ({"attention_bias": True}, "attention_bias = True cannot be represented"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = dynamic"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'factor'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
        ({"hidden_size": "64"}, "hidden_size = 64 must be a whole number"),
        ({"num_attention_heads": 0}, "model.n_heads = 0"),
        ({"num_key_value_heads": 3}, "model.n_kv_heads = 3 does not divide"),
        ({"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 2}, r"model.layers.2.\S+ cannot be represented"),
        ({"intermediate_size": 97}, r"is \(64, 96\), not \(64, 97\)"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_cannot_be_represented_is_refused_by_name(theirs, tmp_path, change, says):
    shutil.copytree(theirs["llama3"], tmp_path / "a")
    said = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(said | change))
    with pytest.raises(InputError, match=says) as raised:
        hf.import_(str(tmp_path / "a"), tmp_path / "a.pt")
    assert str(tmp_path / "a") in str(raised.value) and "\n" not in str(raised.value)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    "change, says",
    [
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, "q_proj.bias cannot be repr"),
        ({NORM: torch.ones(63)}, rf"{NORM} is \(63,\), not \(64,\)"),
        ({NORM: torch.full((64,), torch.nan)}, f"{NORM} is not finite"),
        ({NORM: torch.ones(64, dtype=torch.int8)}, f"{NORM} is of type I8, not a plain float"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(theirs, tmp_path, change, says):
    shutil.copytree(theirs["llama3"], tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    save_file(load_file(file) | change, file)
    with pytest.raises(InputError, match=says):
        hf.import_(str(tmp_path / "a"), tmp_path / "a.pt")


@pytest.mark.parametrize(
    "file, content, says",
    [
        ("config.json", None, "no folder with a config.json"),
        ("config.json", b"{", "config.json cannot be read"),
        ("model.safetensors", None, "there is no model.safetensors"),
        ("model.safetensors", b"pickle", "is damaged or no safetensors file"),
        ("tokenizer.json", None, "no such folder with a tokenizer.json"),
    ],
)
def test_a_missing_or_damaged_file_is_named(theirs, tmp_path, file, content, says):
    shutil.copytree(theirs["llama3"], tmp_path / "a")
    (tmp_path / "a" / file).unlink()
    if content is not None:
        (tmp_path / "a" / file).write_bytes(content)
    with pytest.raises(InputError, match=says):
        hf.import_(str(tmp_path / "a"), tmp_path / "a.pt")


def test_a_checkpoint_that_cannot_be_written_is_named(theirs, tmp_path):
    with pytest.raises(InputError, match=r"cannot be written \(Is a directory\)"):
        hf.import_(str(theirs["llama3"]), tmp_path, overwrite=True)


IMPORT = """
import sys
from pathlib import Path
from utils.cli import run_command
from utils.hf import import_
run_command(lambda: [import_(name, Path(name[4:] + sys.argv[1])) for name in sys.argv[2:]])
"""


def test_a_model_comes_from_the_hub_once_and_then_from_its_cache(theirs, tmp_path):
    files = {f"org/mini/{path.name}": path.read_bytes() for path in theirs["llama3"].iterdir()}
    settings = {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}

    def imported(endpoint, offline, *words):
        return subprocess.run(
            [sys.executable, "-c", IMPORT, *words],
            env=os.environ | settings | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": offline},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )

    with serving(files) as hub:
        cold = imported(hub.endpoint, "0", "-cold.pt", "org/mini")
    warm = imported(hub.endpoint, "1", "-warm.pt", "org/mini", "org/maxi")
    assert (cold.returncode, warm.returncode) == (0, 2), cold.stderr + warm.stderr
    one, other = (load(tmp_path / f"mini-{name}.pt").weights for name in ("cold", "warm"))
    assert all(torch.equal(one[name], weight) for name, weight in other.items())
    assert warm.stderr.startswith("error: model: config.json of org/maxi cannot be fetched")
    assert warm.stderr.count("\n") == 1 and "HF_HUB_OFFLINE" in warm.stderr
