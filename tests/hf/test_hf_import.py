"""Import from transformers' format, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig

from config import InputError
from tests.helpers.fake_hub import serve_hub
from tests.helpers.hf_models import (
    HF_MODELS,
    assert_same_logits,
    hf_logits,
    random_tokens,
    save_hf_model,
)
from tests.helpers.small_models import is_identical
from utils.checkpoint.model import load_checkpoint
from utils.hf.convert import export_checkpoint, import_model
from utils.hf.model_folder import write_weights
from utils.hf.pretrained import find_pretrained

ROOT = Path(__file__).parents[2]
every_model = pytest.mark.parametrize("name", HF_MODELS)


@every_model
def test_an_imported_model_computes_what_it_did(hf_folders, name, tmp_path):
    import_model(str(hf_folders[name]), tmp_path / "a.pt")
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    with torch.no_grad():
        logits = checkpoint.state.model()(random_tokens()).logits
    assert_same_logits(logits, hf_logits(hf_folders[name]))
    assert checkpoint.special_tokens.stop_ids == (0,)
    assert checkpoint.config.seq_len == HF_MODELS[name]["max_position_embeddings"]
    with pytest.raises(InputError, match=r"a.pt is there: --overwrite"):
        import_model(str(hf_folders[name]), tmp_path / "a.pt")


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_in_and_out_again_every_weight_is_what_it_was_bit_for_bit(name, dtype, tmp_path):
    source, back = save_hf_model(tmp_path / "source", HF_MODELS[name], dtype), tmp_path / "back"
    import_model(str(source), tmp_path / "a.pt")
    export_checkpoint(tmp_path / "a.pt", back)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, back))
    assert {weight.dtype for weight in after.values()} == {dtype}
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    old, new = (AutoConfig.from_pretrained(folder).to_dict() for folder in (source, back))
    for key in old.keys() - {"_name_or_path", "initializer_range"}:
        assert new[key] == old[key], key


def test_weights_in_several_files_are_the_same_weights(hf_folders, tmp_path):
    folder = tmp_path / "shards"
    shutil.copytree(hf_folders["llama3"], folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    size = write_weights(folder, dict(tensors), max_shard_size=100_000)
    files = sorted(folder.glob("*.safetensors"))
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert [file.name for file in files] == names and len(files) > 3
    assert size == sum(file.stat().st_size for file in files)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for file in files:
        shard = load_file(file)
        assert {index["weight_map"][name] for name in shard} == {file.name}
    assert torch.equal(hf_logits(folder), hf_logits(hf_folders["llama3"]))
    sharded, whole = (find_pretrained(str(f)).load_state() for f in (folder, hf_folders["llama3"]))
    assert is_identical(sharded, whole)
    files[1].unlink()
    with pytest.raises(InputError, match=f"{files[1].name} is missing"):
        find_pretrained(str(folder))


@pytest.mark.parametrize(
    "change, message",
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
        ({"rope_scaling": ["linear"]}, "not as transformers would write it"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
        ({"hidden_size": "64"}, "model.d_model = '64' must be a whole number"),
        ({"num_attention_heads": 0}, "model.n_heads = 0"),
        ({"num_key_value_heads": 3}, "model.n_kv_heads = 3 does not divide"),
        ({"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 2}, r"model.layers.2.\S+ cannot be represented"),
        ({"intermediate_size": 97}, r"is \(64, 96\), not \(64, 97\)"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = .*sliding"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_cannot_be_represented_is_refused_by_name(hf_folders, tmp_path, change, message):
    folder = tmp_path / "a"
    shutil.copytree(hf_folders["llama3"], folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(InputError, match=message) as raised:
        import_model(str(folder), tmp_path / "a.pt")
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, "q_proj.bias cannot be repr"),
        ({NORM: torch.ones(63)}, rf"{NORM} is \(63,\), not \(64,\)"),
        ({NORM: torch.full((64,), torch.nan)}, f"{NORM} is not finite"),
        ({NORM: torch.ones(64, dtype=torch.int8)}, f"{NORM} is of type I8, not a plain float"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(hf_folders, tmp_path, change, message):
    shutil.copytree(hf_folders["llama3"], tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    save_file(load_file(file) | change, file)
    with pytest.raises(InputError, match=message):
        import_model(str(tmp_path / "a"), tmp_path / "a.pt")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.json", None, "no folder with a config.json"),
        ("config.json", b"{", "config.json cannot be read"),
        ("config.json", b"[1]", "config.json cannot be read"),
        ("model.safetensors", None, "there is no model.safetensors or pytorch_model.bin"),
        ("model.safetensors", b"pickle", "is damaged or no safetensors file"),
        ("tokenizer.json", None, "no such folder with a tokenizer.json"),
    ],
)
def test_a_missing_or_damaged_file_is_named(hf_folders, tmp_path, name, content, message):
    shutil.copytree(hf_folders["llama3"], tmp_path / "a")
    (tmp_path / "a" / name).unlink()
    if content is not None:
        (tmp_path / "a" / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        import_model(str(tmp_path / "a"), tmp_path / "a.pt")


@pytest.mark.parametrize("is_sharded", [False, True])
def test_weights_that_torch_saved_are_the_same_weights(hf_folders, tmp_path, is_sharded):
    source, folder = hf_folders["llama3"], tmp_path / "bin"
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: "pytorch_model.bin" for name in tensors}
    if is_sharded:
        files = {name: f"pytorch_model-{len(name) % 2}.bin" for name in tensors}
        index = folder / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": files}))
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in files if files[name] == file}, folder / file)
    states = (find_pretrained(str(f)).load_state() for f in (folder, source))
    assert is_identical(*states)
    (folder / file).write_bytes(b"no pickle")
    with pytest.raises(InputError, match=rf"{file} is damaged.*save_pretrained"):
        find_pretrained(str(folder))


def test_a_sentencepiece_model_alone_is_told_how_to_convert(hf_folders, tmp_path):
    shutil.copytree(hf_folders["llama3"], tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").rename(tmp_path / "a" / "tokenizer.model")
    with pytest.raises(InputError, match=r"tokenizer.model.*AutoTokenizer.*save_pretrained"):
        import_model(str(tmp_path / "a"), tmp_path / "a.pt")


def test_an_index_without_a_map_is_named(hf_folders, tmp_path):
    shutil.copytree(hf_folders["llama3"], tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    (tmp_path / "a" / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(InputError, match=r"model.safetensors.index.json has no weight_map"):
        find_pretrained(str(tmp_path / "a"))


def test_a_checkpoint_that_cannot_be_written_is_named(hf_folders, tmp_path):
    with pytest.raises(InputError, match=r"cannot be written \(Is a directory\)"):
        import_model(str(hf_folders["llama3"]), tmp_path, overwrite=True)


def test_a_folder_that_is_named_learned_brings_its_own_tokenizer(hf_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(hf_folders["llama3"], tmp_path / "learned")
    import_model("learned", Path("a.pt"))
    saved = Tokenizer.from_str(load_checkpoint(Path("a.pt")).tokenizer)
    own = Tokenizer.from_file("learned/tokenizer.json")
    assert saved.get_vocab() == own.get_vocab()


IMPORT = """
import sys
from pathlib import Path
from utils.runtime.cli import run_command
from utils.hf.convert import import_model
run_command(lambda: [import_model(name, Path(name[4:] + sys.argv[1])) for name in sys.argv[2:]])
"""


def test_a_model_comes_from_the_hub_once_and_then_from_its_cache(hf_folders, tmp_path):
    files = {f"org/mini/{path.name}": path.read_bytes() for path in hf_folders["llama3"].iterdir()}
    settings = {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}

    def run_import(endpoint, offline, *words):
        return subprocess.run(
            [sys.executable, "-c", IMPORT, *words],
            env=os.environ | settings | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": offline},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )

    with serve_hub(files) as hub:
        cold = run_import(hub.endpoint, "0", "-cold.pt", "org/mini")
    warm = run_import(hub.endpoint, "1", "-warm.pt", "org/mini", "org/maxi")
    assert (cold.returncode, warm.returncode) == (0, 2), cold.stderr + warm.stderr
    first, second = (load_checkpoint(tmp_path / f"mini-{name}.pt") for name in ("cold", "warm"))
    assert is_identical(first.state, second.state)
    assert warm.stderr.startswith("error: model: config.json of org/maxi cannot be fetched")
    assert warm.stderr.count("\n") == 1 and "HF_HUB_OFFLINE" in warm.stderr
